"""Every layout of the table has tests and a row on the page."""

from __future__ import annotations

import re
from pathlib import Path

from swsurgery.checkpoint.layouts.find import LAYOUTS

FOLDER = Path(__file__).parent
PAGE = (FOLDER.parents[2] / "docs" / "layouts.md").read_text()

COVERED = {
    "find_scaled": ("test_fp8_and_fp4.py", "FP8 with `weight_scale_inv`"),
    "find_pack_quantized": ("test_compressed_tensors.py", "`pack-quantized`"),
    "find_plain_codes": ("test_compressed_tensors.py", "`int-quantized`"),
    "find_packed_fp4": ("test_compressed_tensors.py", "`nvfp4-pack-quantized`"),
    "find_modelopt_fp4": ("test_compressed_tensors.py", "NVFP4 | ModelOpt"),
    "find_fp4_in_bytes": ("test_fp8_and_fp4.py", "FP4 in I8"),
    "find_stacked_fp4": ("test_fp8_and_fp4.py", "MXFP4 of experts"),
    "find_gptq": ("test_gptq.py", "`gptq`"),
    "find_awq": ("test_awq.py", "AWQ `gemm`"),
    "find_auto_round": ("test_auto_round.py", "`auto-round`"),
    "find_bitsandbytes": ("test_bitsandbytes.py", "NF4 and FP4"),
    "find_gguf": ("test_gguf.py", "GGUF"),
    "find_torchao": ("test_torchao.py", "int4 (`Int4Tensor`)"),
    "find_quanto": ("test_quanto.py", "int8 and float8 | quanto"),
}
"""The file with the tests of each layout, and words with which a row of docs/layouts.md begins."""


def test_every_layout_has_tests_and_a_row_on_the_page():
    assert set(COVERED) == {find.__name__ for find in LAYOUTS}
    for file, row in COVERED.values():
        assert (FOLDER / file).is_file()
        assert re.search(rf"^\| {re.escape(row)}.*\|$", PAGE, re.M), row
