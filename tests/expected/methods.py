"""One row a method: the messages, counts and names that the tests expect."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

from tests.expected.names import (
    Case,
    adapter_names,
    bias_names,
    core_names,
    factor_names,
    ia3_names,
    lora_names,
    magnitude_names,
    mlp_names,
    norm_names,
    output_head,
    position_bias_names,
    scl_names,
    train_bias_names,
    used_names,
    value_names,
    virtual_names,
)


@dataclass(frozen=True)
class Expected:
    """The row of one method.

    ``sent``, ``counts`` and ``personal`` hold for the tests' tiny BERT with ``fields``.

    Args:
        sent: patterns of the names sent up and of the names sent down, for rounds 1 and 2.
        counts: numbers of tensors and of values that a client sends up, for rounds 1 and 2.
        shared_names: names, in any model and round, of the parameters that train and are sent.
        personal_names: names of the parameters that train and stay with the client.
        personal: pattern of the names that stay with the client; null if none does.
        fields: overrides that the tiny model needs, because it is narrower than the defaults are
            made for.
    """

    sent: list[tuple[str, str]]
    counts: list[tuple[int, int]]
    shared_names: Callable[[Case], set[str]]
    personal_names: Callable[[Case], set[str]] = lambda case: set()
    personal: str | None = None
    fields: list[str] = field(default_factory=list)

    def names(self, case: Case) -> tuple[set[str], set[str]]:
        """Return the names of the shared and of the personal parameters of a model in a round."""
        return self.shared_names(case), self.personal_names(case)


def names_of(model: nn.Module, pattern: str) -> list[str]:
    """Return the names of a model's parameters that a pattern matches, in the model's order."""
    return [name for name, _ in model.named_parameters() if re.search(pattern, name)]


# Patterns of names.
HEAD = r"^classifier\.(weight|bias)$"
LORA, FFA, BASE = rf"\.lora_[AB]\.|{HEAD}", rf"\.lora_B\.|{HEAD}", r"\.base_layer\.weight$"
DORA, DITTO = rf"{LORA}|\.lora_magnitude_vector\.", rf"\.lora_[AB]\.global\.|{HEAD}"
DUAL, CORE = rf"\.lora_[AB]\.shared\.|{HEAD}", rf"\.core$|{HEAD}"
HEADS, VALUES = rf"\.(core|scales)$|{HEAD}", rf"\.values$|{HEAD}"
SCL = rf"\.(compress|project)$|{HEAD}"
FEDTT = rf"\.factor_\d_of_\d$|(down|up|pooler\.dense)\.bias$|{HEAD}"
MLP = rf"\.intermediate\.dense\.weight$|\d\.output\.dense\.weight$|{HEAD}"
BIASES, SCALES = rf"bias$|{HEAD}", rf"\.ia3_l\.|{HEAD}"
ADAPTER = rf"\.adapter\.(down|up)\.|LayerNorm\.|{HEAD}"
PROMPT, PREFIX = (rf"{part}|^inner\.classifier\." for part in (r"\.prompt\.", r"^prefix\."))

# Counts by hand for the tiny BERT: hidden 32, MLP 64, two layers, four labels (a head of
# 32 * 4 + 4 = 132), rank 4 on q and v, SCL at 8, TT at 5 on 32x64 = (4, 8, 8, 8), 64x32 = (8, 8,
# 8, 4) and a pooler of 32x32 = (4, 8, 8, 4).
WORDS = 5 + 71  # special tokens, and the words of the texts
BLOCK = 4 * 32 * 33 + 64 * 33 + 32 * 65 + 4 * 32  # attention, MLP, two norms
RANK = ["method.rank=4"]
LORA_COUNT = (8 + 2, 2 * 2 * 4 * (32 + 32) + 132)
AS_LORA = Expected(
    sent=[(LORA, LORA)] * 2,
    counts=[LORA_COUNT] * 2,
    shared_names=lambda case: lora_names(case.parts) | case.head,
    fields=RANK,
)
AS_PROMPT = Expected(
    sent=[(PROMPT, PROMPT)] * 2,
    counts=[(1 + 2, 4 * 32 + 132)] * 2,
    shared_names=lambda case: virtual_names("prompt", case.parts),
    fields=["method.num_tokens=4"],
)
EXPECTED: dict[str, Expected] = {
    "lora": AS_LORA,
    "flasc": AS_LORA,  # the largest entries alone are sent
    "federa": AS_LORA,
    "flexlora": AS_LORA,
    "hetlora": AS_LORA,
    "fedrot_lora": AS_LORA,
    "lora_fair": AS_LORA,
    "fedex_lora": replace(AS_LORA, sent=[(LORA, LORA), (LORA, rf"{LORA}|{BASE}")]),
    "flora": replace(AS_LORA, sent=[(LORA, LORA), (LORA, rf"{LORA}|{BASE}")]),
    "ffa_lora": Expected(
        sent=[(FFA, FFA)] * 2,
        counts=[(4 + 2, 2 * 2 * 4 * 32 + 132)] * 2,
        shared_names=lambda case: lora_names(case.parts, "B") | case.head,
        fields=RANK,
    ),
    "fedsvd": Expected(
        sent=[(FFA, FFA), (FFA, LORA)],
        counts=[(4 + 2, 2 * 2 * 4 * 32 + 132)] * 2,
        shared_names=lambda case: lora_names(case.parts, "B") | case.head,
        fields=RANK,
    ),
    "rolora": Expected(
        sent=[(FFA, FFA), (rf"\.lora_A\.|{HEAD}", LORA)],
        counts=[(4 + 2, 2 * 2 * 4 * 32 + 132)] * 2,
        shared_names=lambda c: lora_names(c.parts, "B" if c.round % 2 else "A") | c.head,
        fields=RANK,
    ),
    "fedsa_lora": Expected(
        sent=[(r"\.lora_A\.", r"\.lora_A\.")] * 2,
        counts=[(4, 2 * 2 * 4 * 32)] * 2,
        shared_names=lambda case: lora_names(case.parts, "A"),
        personal_names=lambda case: lora_names(case.parts, "B") | case.head,
        personal=rf"\.lora_B\.|{HEAD}",
        fields=RANK,
    ),
    "feddpa": Expected(
        sent=[(DUAL, DUAL)] * 2,
        counts=[LORA_COUNT] * 2,
        shared_names=lambda case: lora_names(case.parts, adapter="shared") | case.head,
        personal_names=lambda case: lora_names(case.parts, adapter="own"),
        personal=r"\.lora_[AB]\.own\.",
        fields=RANK,
    ),
    "ditto": Expected(
        sent=[(DITTO, DITTO)] * 2,
        counts=[LORA_COUNT] * 2,
        shared_names=lambda case: lora_names(case.parts, adapter="global") | case.head,
        personal_names=lambda case: lora_names(case.parts, adapter="personal"),
        personal=r"\.lora_[AB]\.personal\.",
        fields=RANK,
    ),
    "dora": Expected(
        sent=[(DORA, DORA)] * 2,
        counts=[(8 + 4 + 2, 2 * 2 * 4 * (32 + 32) + 4 * 32 + 132)] * 2,
        shared_names=lambda c: lora_names(c.parts) | magnitude_names(c.parts) | c.head,
        fields=RANK,
    ),
    "fed_sb": Expected(
        sent=[(CORE, rf"{CORE}|\.basis_(in|out)$")] * 2,
        counts=[(4 + 2, 2 * 2 * 8 * 8 + 132)] * 2,
        shared_names=lambda case: core_names(case.parts, "core") | case.head,
        fields=["method.rank=8"],
    ),
    "ravan": Expected(
        sent=[(HEADS, HEADS)] * 2,
        counts=[(8 + 2, 2 * 2 * (3 * 4 * 4 + 3) + 132)] * 2,
        shared_names=lambda case: core_names(case.parts, "core", "scales") | case.head,
        fields=["method.rank=4", "method.heads=3"],
    ),
    "slora": Expected(
        sent=[(VALUES, VALUES), (LORA, rf"{LORA}|{VALUES}")],
        counts=[(4 + 2, 2 * 2 * 51 + 132), LORA_COUNT],  # 5 % of 1,024 places are 51
        shared_names=lambda c: (value_names if c.round == 1 else lora_names)(c.parts) | c.head,
        fields=["method.rank=4", "method.sparse_rounds=1", "method.density=0.05"],
    ),
    "fedftg": Expected(
        sent=[(MLP, MLP)] * 2,
        counts=[(4 + 2, 2 * 2 * 32 * 64 + 132)] * 2,
        shared_names=lambda case: mlp_names(case.parts) | case.head,
        fields=RANK,
    ),
    "scl": Expected(
        sent=[(SCL, SCL)] * 2,
        counts=[(4 + 2, 2 * 8 * (64 + 32) + 132)] * 2,
        shared_names=lambda case: scl_names(case.parts) | case.head,
        fields=["method.rank=8"],
    ),
    "fedtt": Expected(
        sent=[(FEDTT, FEDTT)] * 2,
        counts=[(40 + 5 + 2, 4 * (2 * 460 + 64 + 32) + (440 + 32) + 132)] * 2,
        shared_names=lambda case: (
            factor_names(case.parts) | train_bias_names(case.parts) | output_head(case.parts)
        ),
    ),
    "fedtt_plus": Expected(
        sent=[
            (rf"\.factor_[134]_of_4$|{HEAD}", rf"\.factor_[134]_of_4$|{HEAD}"),
            (rf"\.factor_[124]_of_4$|{HEAD}", rf"\.factor_[1234]_of_4$|{HEAD}"),
        ],
        counts=[(24 + 3 + 2, 4 * 2 * 260 + 240 + 132)] * 2,
        shared_names=lambda case: (
            factor_names(case.parts, {1, 2 + case.round % 2, 4}) | output_head(case.parts)
        ),
    ),
    "full": Expected(
        sent=[("", "")] * 2,
        # embeddings of words, positions and two segments, their norm, two blocks, pooler, head
        counts=[(5 + 2 * 16 + 2 + 2, (WORDS + 64 + 2 + 2) * 32 + 2 * BLOCK + 32 * 33 + 132)] * 2,
        shared_names=used_names,
    ),
    "bitfit": Expected(
        sent=[(BIASES, BIASES)] * 2,
        counts=[(1 + 2 * 8 + 1 + 2, 32 + 2 * (4 * 32 + 64 + 3 * 32) + 32 + 132)] * 2,
        shared_names=lambda case: (
            bias_names(case.kind, case.parts) | position_bias_names(case) | case.head
        ),
    ),
    "adapter": Expected(
        sent=[(ADAPTER, ADAPTER)] * 2,
        counts=[(16 + 10 + 2, 4 * (2 * 32 * 8 + 8 + 32) + 5 * 2 * 32 + 132)] * 2,
        shared_names=lambda case: adapter_names(case.parts) | norm_names(case) | case.head,
        fields=["method.bottleneck=8"],
    ),
    "ia3": Expected(
        sent=[(SCALES, SCALES)] * 2,
        counts=[(6 + 2, 2 * (32 + 32 + 64) + 132)] * 2,
        shared_names=lambda case: ia3_names(case.parts) | case.head,
    ),
    "prompt": AS_PROMPT,
    "fedprompt": AS_PROMPT,
    "p_tuning": Expected(
        sent=[(PROMPT, PROMPT)] * 2,
        counts=[(1 + 6 + 2, 4 * 32 + (33 * 8 + 9 * 8 + 9 * 32) + 132)] * 2,
        shared_names=lambda case: virtual_names("p_tuning", case.parts),
        fields=["method.num_tokens=4", "method.hidden=8"],
    ),
    "prefix": Expected(
        sent=[(PREFIX, PREFIX)] * 2,
        counts=[(1 + 2, 4 * 2 * 2 * 32 + 132)] * 2,
        shared_names=lambda case: virtual_names("prefix", case.parts),
        fields=["method.num_tokens=4"],
    ),
}
# Columns of the table.
TINY = {method: row.fields for method, row in EXPECTED.items()}
SENT = {method: row.sent for method, row in EXPECTED.items()}
PERSONAL = {method: row.personal for method, row in EXPECTED.items() if row.personal}
