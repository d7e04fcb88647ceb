"""Find tied weights: tensors that loaders use as one parameter, such as the embedding and the language-modelling head.

If both tensors of a tied pair are stored, a loader keeps one of them and drops the other, so an edit of only one tensor
may have no effect. This module finds the pairs in a checkpoint and decides from config.json if they are tied. It must
not import transformers: a test compares the tables of this module with the classes of transformers instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from swsurgery.checkpoint.checkpoint import Checkpoint
from swsurgery.storage.coordinate import Coordinate
from swsurgery.storage.files import read_exactly
from swsurgery.storage.region import Region
from swsurgery.storage.splice import Splice

_TIED_BY_DEFAULT = """
albert aya_vision bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small blip
blip_text_model bloom camembert canary cohere cohere2 cohere2_moe cohere2_vision cohere_compass_text convbert
cpmant csm ctrl d_fine dab-detr data2vec-text deberta deberta-v2 deepseek_vl deepseek_vl_hybrid deformable_detr
deimv2 diffusion_gemma diffusion_gemma_text distilbert electra ernie ernie4_5 ernie4_5_moe ernie4_5_vl_moe
ernie4_5_vl_moe_text esm falcon falcon_mamba flaubert flava florence2 fnet fun_asr_nano funnel gemma gemma2 gemma3
gemma3_text gemma3n gemma3n_text gemma4 gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant
gemma4_unified_text glmasr got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox_japanese granite_docling
granite_docling_text granite_speech granite_speech5_ctc granite_speech_plus granite_swa grounding-dino gte
hunyuan_vl hunyuan_vl_text hyperclovax_vision_v2 ibert internvl janus jetmoe jina_embeddings_v3 kimi_k25 kosmos-2
kosmos-2.5 kosmos_2_5_text_model kosmos_2_text_model layoutlm led lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl lighton_ocr
longformer longt5 luke lxmert m2m_100 mamba marian mbart megatron-bert mimi mimi_decoder mimi_encoder minicpm3
minicpm_ocr mistral3 mm-grounding-dino mobilebert modernbert modernbert-decoder moonshine moss_transcribe_diarize
mpnet mpt mra mt5 mvp neomme nllb-moe nomic_bert nystromformer openai-gpt opt ovis2 paddleocr_vl paddleocr_vl_text
paligemma pe_audio_video pegasus pegasus_x plbart pop2piano pp_chart2table pp_doclayout_v3 pp_doclayout_v4
prophetnet qwen2_5_omni_text qwen3_asr qwen3_vl_moe_text recurrent_gemma roberta roberta-prelayernorm roc_bert
roformer rt_detr_v2 sam sam_hq seamless_m4t seamless_m4t_v2 shieldgemma2 smollm3 speech_to_text speecht5
squeezebert starcoder2 switch_transformers t5 t5_gemma_module t5gemma t5gemma2 t5gemma2_decoder t5gemma2_encoder
t5gemma2_text tapas trocr udop umt5 vaultgemma vilt visual_bert voxtral_realtime whisper xglm xlm xlm-roberta
xlm-roberta-xl xlnet xmod yoso youtu zamba zamba2 zaya
"""
TIED_BY_DEFAULT = frozenset(_TIED_BY_DEFAULT.split())
"""Model types whose head is tied by default: transformers ties them if config.json lacks `tie_word_embeddings`."""

_UNTIED_BY_DEFAULT = """
EvollaModel afmoe apertus arcee aria aria_text axk1 axk2 bailing_hybrid bamba beam bitnet blt
blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher bridgetower chameleon codegen cohere_asr
cohere_compass cosmos3_edge cosmos3_edge_text cosmos3_omni cwm dbrx deepseek_ocr2 deepseek_ocr2_encoder
deepseek_ocr2_text deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note
dots3_note_text emu3 emu3_text_model esmc eurobert evolla exaone4 exaone4_5 exaone_moe falcon_h1 fast_vlm
flex_olmo flint fsmt fuyu git glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text glm5_next
glm5_next_text glm_image glm_moe_dsa glm_ocr glmga gpt_neox gpt_oss gptj granite granite4_vision
granite4_vision_text granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium higgs_audio_v2 hrm_text
hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax idefics idefics2 idefics3 imagegpt internlm3 iquestcoder
jais2 jamba kimi_linear kolibri1 kyutai_speech_to_text laguna llama llama4 llama4_text llava llava_next
llava_next_video llava_onevision longcat_flash mamba2 mellum mimo_v2_flash minicpmv4_6 minicpmv4_7 minimax
minimax_m2 minimax_m3_vl minimax_m3_vl_text ministral ministral3 mistral mistral4 mistral_large4
mistral_large4_text mixtral mllama_text_model modernvbert molmo2 molmo2_text moonshine_streaming moshi moshi_depth
muse_glimmer_text muse_spark_text musicgen_decoder musicgen_melody_decoder nanochat nemotron nemotron_h neucodec
olmo olmo2 olmo3 olmo_hybrid olmoe openai_privacy_filter perception_lm persimmon phi phi3 phi4_multimodal phimoe
pix2struct pix2struct_text_model pp_formulanet_text qianfan_ocr qwen2 qwen2_5_omni_talker qwen2_5_omni_thinker
qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
qwen3_omni_moe_talker_code_predictor qwen3_omni_moe_talker_text qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe
qwen4_exp qwen4_exp_text reformer rembert rwkv seed_oss smolvlm solar_open stablelm step3p5 ultrabert ultravbert
unlimited_ocr unlimited_ocr_text vibevoice video_llama_3 video_llava vipllava xcodec2 xlstm
"""
UNTIED_BY_DEFAULT = frozenset(_UNTIED_BY_DEFAULT.split())
"""Model types whose head is not tied by default. The default of any other type is unknown: transformers 4 ties it,
transformers 5 does not."""

_HEADS = """
lm_head embed_out output proj_out output_projection output_layer ff_out head decoder lm_head.decoder lm_head.out_proj
cls.predictions.decoder predictions.decoder head.decoder mlm_score.decoder generator_lm_head vocab_projector lm_loss
pred_layer.proj
"""
HEADS = tuple(_HEADS.split())
"""Names of language-modelling heads, without the ending ".weight"."""

_ENDINGS = tuple(f"{head}.weight" for head in HEADS)
_LONGEST_FIRST = "|".join(map(re.escape, sorted(HEADS, key=len, reverse=True)))
_HEAD = re.compile(rf"(?P<prefix>(?:.*?\.)??)(?:{_LONGEST_FIRST})\.weight", re.DOTALL)

_TRUNKS = ("model.", "model.language_model.", "language_model.model.", "language_model.", "model.text_model.", "")
_INPUTS = ("embed_tokens", "tok_embeddings", "embeddings.tok_embeddings", "shared")
_EMBEDDINGS = """
model.decoder.embed_tokens decoder.embed_tokens model.encoder.text_model.embed_tokens model.embed_tokens.embed_tokens
model.embed_tokens.word_embeddings model.local_encoder.embed_tokens transformer.wte wte transformer.word_embeddings
word_embeddings transformer.word_embedding transformer.embeddings transformer.tokens_embed transformer.w
backbone.embeddings backbone.embedding rwkv.embeddings gpt_neox.embed_in gpt_neox_japanese.embed_in embed_in
biogpt.embed_tokens led.shared prophetnet.word_embeddings embedding.word_embeddings model.embeddings
"""
EMBEDDINGS = (*(trunk + name for trunk in _TRUNKS for name in _INPUTS), *_EMBEDDINGS.split())
"""Names of embeddings, without the prefix that they have in common with the head and without the ending ".weight". The
head is tied to the first of them that is stored."""

_ENCODER_EMBEDDING = re.compile(r"\w+(\.\w+)?\.embeddings(\.text_embeddings)?\.word_embeddings\.weight")
"""The pattern of the full name of the embedding in BERT and related models, without the prefix that it has in common
with the head. The first part is the name of the model, as in "bert.embeddings.word_embeddings.weight"."""

COPIES = {
    "shared": (
        *("encoder.embed_tokens", "decoder.embed_tokens", "text_encoder.embed_tokens", "text_decoder.embed_tokens"),
    ),
    "decoder.embed_tokens": (
        *("encoder.embed_tokens", "encoder.text_model.embed_tokens", "encoder.language_model.embed_tokens"),
    ),
    "word_embeddings": ("encoder.word_embeddings", "decoder.word_embeddings"),
}
"""Embeddings of encoder-decoders, with the other names under which the same embedding may be stored again. config.json
does not state which of these tensors are tied, so two of them count as tied if their stored values are the same."""

_TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys of config.json under which multimodal models describe their language model."""

_SETTINGS = ("tie_word_embeddings", "tie_embedding", "weight_tying")
"""Keys of config.json that state if the head is tied. LFM2 uses `tie_embedding`, and OLMo 1 uses `weight_tying`."""

_SAMPLED_ROWS = 16
"""Maximum number of rows of each tensor that are compared to decide if two tensors have the same values."""

_SAMPLED_BYTES = 64 << 10
"""Maximum number of bytes of each row that are compared."""


def is_tied_by_config(config: Mapping[str, object]) -> bool | None:
    """Decide from config.json if the head is tied to the embedding.

    If several sections of config.json state a value, the section of the text model decides, as in transformers 4 and
    vLLM. If no section states a value, the model types of all sections must have the same default, because transformers
    5 uses the outermost section and other loaders the innermost. Returns None if loaders would decide differently, or
    if the default of a model type is unknown.
    """
    sections = list(list_sections(config))
    stated = [_read_setting(section) for section in sections]
    values = [
        default if value is None else value for value, default in zip(stated, map(_get_default, sections), strict=True)
    ]
    if next((value for value in stated if value is not None), False):
        return True
    if False not in values and True in values:
        return True
    return False if set(values) == {False} else None


def list_tied_pairs(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of stored tensors that can be tied: (head, embedding) and (embedding, copy of the embedding).

    Whether the tensors of a pair are tied is not examined.
    """
    yield from _list_heads(names)
    yield from _list_copies(names)


def find_tied_partner(name: str, checkpoint: Checkpoint) -> str | None:
    """Return the stored tensor that loaders use for the tensor `name`, which is not stored.

    Returns None if no stored tensor is tied to it.
    """
    stored = checkpoint.weight_map.keys()
    heads, with_name = set(_list_heads(stored)), set(_list_heads({*stored, name}))
    # If `name` would replace the embedding of a stored head, it is a mistyped name and not an omitted tied tensor.
    if not heads <= with_name or is_tied_by_config(checkpoint.config) is False:
        with_name = set()
    pairs = sorted({*with_name, *_list_copies({*stored, name})})
    return next((other for pair in pairs if name in pair for other in pair if other != name), None)


def list_tied_faults(
    splices: Sequence[Splice], checkpoint: Checkpoint, regions: Collection[tuple[Region, str]] = ()
) -> list[str]:
    """Return a message for every edit that changes only one tensor of a tied pair although both tensors are stored.

    `regions` are the changed regions, each with a text that is equal for equal operations.
    """
    if not splices and not regions:
        return []
    new = {splice.coordinate: splice.new for splice in splices}
    by_config = is_tied_by_config(checkpoint.config)
    names = checkpoint.weight_map.keys()
    pairs = [(pair, by_config) for pair in _list_heads(names)] + [(pair, None) for pair in _list_copies(names)]
    faults = []
    for pair, tied in pairs:
        one_sided: list[tuple[Coordinate | Region, str]] = []
        for tensor, partner in (pair, pair[::-1]):
            one_sided += [
                (splice.coordinate, partner)
                for splice in splices
                if splice.coordinate.tensor == tensor
                and new.get(Coordinate(partner, splice.coordinate.index)) != splice.new
            ]
            one_sided += [
                (region, partner)
                for region, operation in regions
                if region.tensor == tensor and (Region(partner, region.bounds), operation) not in regions
            ]
        if one_sided and (reason := _find_reason(*pair, tied, checkpoint)):
            faults += [
                f"{place} {reason.format(partner)} (edit both tensors in the same way)" for place, partner in one_sided
            ]
    return faults


def _find_reason(first: str, second: str, tied: bool | None, checkpoint: Checkpoint) -> str | None:
    """Return the reason why two stored tensors must have the same edits; None if they need not.

    The reason is a text about one of the tensors, with "{}" in place of the other tensor's name. `tied` is the answer
    of `is_tied_by_config`.
    """
    if tied is False or first in checkpoint.disagreements or second in checkpoint.disagreements:
        return None
    if checkpoint.get_info(first).shape != checkpoint.get_info(second).shape:
        return None
    if tied:
        return "is tied to {}, which is stored too: loaders keep one of the two"
    if is_stored_alike(first, second, checkpoint):
        return "may be tied to {}, which is stored with the same values: some loaders keep only one of the two"
    return None


def is_stored_alike(first: str, second: str, checkpoint: Checkpoint) -> bool:
    """Return True if two tensors have the same shape and dtype, and more than half of the compared rows are equal.

    At most _SAMPLED_ROWS evenly spaced rows are compared. Some rows may differ, because an earlier edit may have
    changed a few scalars of only one tensor.
    """
    one, other = checkpoint.get_info(first), checkpoint.get_info(second)
    if (one.shape, one.dtype) != (other.shape, other.dtype) or not one.size:
        return False
    rows = one.shape[0] if len(one.shape) > 1 else 1
    chosen = sorted({row * rows // _SAMPLED_ROWS for row in range(_SAMPLED_ROWS)})
    same = sum(
        a == b
        for a, b in zip(_read_rows(first, chosen, checkpoint), _read_rows(second, chosen, checkpoint), strict=True)
    )
    return 2 * same > len(chosen)


def _read_rows(tensor: str, rows: Sequence[int], checkpoint: Checkpoint) -> Iterator[bytes]:
    """Yield the first _SAMPLED_BYTES bytes of each of the given rows of a tensor. Raises CheckpointError."""
    info, shard = checkpoint.get_info(tensor), checkpoint.shards[checkpoint.weight_map[tensor]]
    size = info.size // (info.shape[0] if len(info.shape) > 1 else 1)
    with shard.file.open() as file:
        for row in rows:
            yield read_exactly(file, min(size, _SAMPLED_BYTES), shard.data_start + info.data_offsets[0] + row * size)


def list_sections(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """Yield the parts of config.json that may describe the language model, the innermost first."""
    for key in _TEXT_SECTIONS:
        section = config.get(key)
        if isinstance(section, Mapping):
            yield from list_sections(section)
    yield config


def _read_setting(section: Mapping[str, object]) -> bool | None:
    """Return True or False if a section of config.json states that the head is tied or not; None if it states neither.

    If several keys of _SETTINGS exist, one that is true suffices.
    """
    values = [bool(section[key]) for key in _SETTINGS if section.get(key) is not None]
    return any(values) if values else None


def _get_default(section: Mapping[str, object]) -> bool | None:
    """Return True or False if models of the section's model type have a tied head by default or not.

    Returns None if the model type is unknown.
    """
    model_type = section.get("model_type")
    if not isinstance(model_type, str) or model_type not in TIED_BY_DEFAULT | UNTIED_BY_DEFAULT:
        return None
    return model_type in TIED_BY_DEFAULT


def _list_heads(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs (head, embedding) of tensors in `names` whose names have the same prefix."""
    encoders = [name for name in names if name.endswith(".word_embeddings.weight")]
    for name in (name for name in names if name.endswith(_ENDINGS)):
        head = _HEAD.fullmatch(name)
        embedding = _find_embedding(head["prefix"], names, encoders) if head else None
        if embedding is not None:
            yield name, embedding


def _list_copies(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs (embedding, copy of the embedding) among `names`, which encoder-decoders may store."""
    endings = tuple(f"{original}.weight" for original in COPIES)
    for name in (name for name in names if name.endswith(endings)):
        for original, copies in COPIES.items():
            prefix = name.removesuffix(f"{original}.weight")
            if prefix == "" or (prefix != name and prefix.endswith(".")):
                yield from ((name, copy) for copy in (f"{prefix}{c}.weight" for c in copies) if copy in names)


def _find_embedding(prefix: str, names: Collection[str], encoders: Sequence[str]) -> str | None:
    """Return the name of the embedding that has the prefix of the head; None if `names` does not contain one.

    `encoders` are the names that may be the embedding of a BERT model.
    """
    for name in EMBEDDINGS:
        if f"{prefix}{name}.weight" in names:
            return f"{prefix}{name}.weight"
    return next((n for n in encoders if n.startswith(prefix) and _ENCODER_EMBEDDING.fullmatch(n[len(prefix) :])), None)
