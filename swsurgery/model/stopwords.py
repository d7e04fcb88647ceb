"""List English function words, which are the stop words of the check.

They are articles, pronouns, prepositions, conjunctions, auxiliaries and some adverbs of degree and time. A model
without its super weights gives such words more probability (arXiv:2411.07191), so the check measures their total
probability. The list must not change: figures measured with different lists cannot be compared.
"""

from __future__ import annotations

_LIST = """
a an the this that these those
i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself
we us our ours ourselves they them their theirs themselves one
who whom whose which what where when why how whoever whatever whichever
some any all both each every either neither none no not nor few many much more most other another such own same
and or but if then else than so because since as while although though unless until whether
about above across after against along among around at before behind below beneath beside between beyond by
despite down during except for from in inside into like near of off on onto out outside over past per
through throughout to toward towards under up upon via with within without
am is are was were be been being do does did doing done have has had having
can could may might must shall should will would ought
again also already always ever never just only even still too very quite rather yet once here there now
"""
STOP_WORDS = frozenset(_LIST.split())
"""The stop words, in lower case."""
