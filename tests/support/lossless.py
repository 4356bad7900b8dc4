"""Every lossless method and way of drafting that test_lossless.py compares with plain decoding."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "cp": {},
    "cp:chain": {"tree": "chain"},
    "cp:rejection": {"tree": "chain", "acceptance": "rejection"},
    "cp:siblings": {"tree": "2x2x1", "acceptance": "rejection"},
    "cp:tree": {"tree": "2x2x1"},
    "cp:whole": {"tree": "2x2x1"},
    "ngram": {},
    "ngram:chain": {"drafts": 4},
    "ngram:tree": {"branches": "3x2x1"},
    "prompt_lookup": {},
    "self_speculative": {"skip_attention": "1", "drafts": 4},
    "self_speculative:auto": {"skip_mlp": "0", "skip_attention": "2"},
    "independent_heads": {},
    "independent_heads:chain": {"tree": "chain"},
    "independent_heads:tree": {"tree": "2x2x1"},
    "hydra": {},
    "hydra:chain": {"tree": "chain"},
    "hydra:copy": {"copy": True},
    "hydra:tree": {"tree": "2x2x1"},
    "cp:copy": {"copy": True},
    "medusa": {},
    "medusa:copy": {"tree": "2x2x1", "copy": True},
    "medusa:chain": {"tree": "chain"},
    "medusa:tree": {"tree": "2x2x1"},
    "medusa:random": {"tree": "3x1"},
    "hidden_transfer": {},
    "hidden_transfer:all": {"tree": "2x2x1", "pseudo": "all"},
    "hidden_transfer:auto": {"pseudo": "all"},
    "hidden_transfer:copy": {"pseudo": "all", "copy": True},
    "hidden_transfer:random": {"tree": "3x1"},
    "dmtd": {"cycle": 4, "early": 1, "late": 1, "lossless": True},
}
# Lossless beside plain decoding of their own: cycles of one; the mixture's first token.
OWN_PLAIN = ("cp:whole", "dmtd")
UNTRAINED = ("medusa:random", "hidden_transfer:random")
# They run what others run, with other sizes or weights: at one batch size.
AS_OTHERS = (
    *("cp", "hidden_transfer:auto", "hydra", "independent_heads", "medusa", "ngram"),
    *("hydra:chain", "independent_heads:chain", "self_speculative:auto", *UNTRAINED),
    *("cp:copy", "hidden_transfer:copy", "medusa:copy"),
)
