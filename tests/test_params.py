"""The papers' parameter counts, on the published architectures without their weights."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedpeft.commands.planning import params
from fedpeft.config.load import load_config
from fedpeft.config.schema import Config
from fedpeft.engine.parameters import count_on_meta
from fedpeft.reporting.tables import span, span_of_bytes
from tests.pairs import names_in, with_method

BASE = ("model=roberta_base", "data=sst2")
LARGE = ("model=roberta_large", "data=sst2")
LLAMA7B = ("model=llama2_7b", "data=docstrings_lm")
LLAMA13B = (
    *LLAMA7B,
    "model.architecture.hidden_size=5120",
    "model.architecture.intermediate_size=13824",
    "model.architecture.num_hidden_layers=40",
    "model.architecture.num_attention_heads=40",
    "model.architecture.num_key_value_heads=40",
)
# RoBERTa's head: dense d x d, output layer d x 2, their biases.
BASE_OUTPUT, LARGE_OUTPUT = 768 * 2 + 2, 1024 * 2 + 2
BASE_HEAD, LARGE_HEAD = 768 * 769 + BASE_OUTPUT, 1024 * 1025 + LARGE_OUTPUT


@cache
def setting(*overrides: str) -> Config:
    return load_config(list(overrides))


@cache
def count(*overrides: str) -> dict[str, Any]:
    """Count for a setting, ``method=name`` and its fields; Hydra composes a setting once."""
    (name,) = [o.removeprefix("method=") for o in overrides if o.startswith("method=")]
    fields = [o for o in overrides if o.startswith("method.")]
    rest = [o for o in overrides if not o.startswith("method")]
    return count_on_meta(with_method(setting(*rest), name, fields))


@pytest.mark.parametrize(
    ("setting", "tt_rank", "expected"),
    [
        (BASE, 5, 38_360 + 20_736 + BASE_OUTPUT),
        (BASE, 5, 60_634),
        (BASE, 10, 167_794),
        (LARGE, 5, 137_178),
        (LARGE, 10, 375_058),
        (LLAMA7B, 5, 407_040),
        (LLAMA7B, 10, 803_840),
        (LLAMA13B, 5, 585_120),
        (LLAMA13B, 10, 1_075_520),
    ],
)
def test_fedtt(setting: tuple[str, ...], tt_rank: int, expected: int) -> None:
    found = count(*setting, "method=fedtt", f"method.tt_rank={tt_rank}")
    assert found["trained"] == found["sent_up"] == found["sent_down"] == [expected, expected]


@pytest.mark.parametrize(
    ("setting", "least", "most", "factors", "head"),
    [
        (BASE, 13_760, 18_560, 38_360, BASE_OUTPUT),
        (LARGE, 23_280, 23_480, 81_880, LARGE_OUTPUT),
        (LLAMA7B, 44_800, 44_800, 140_800, 0),
    ],
)
def test_fedtt_plus(
    setting: tuple[str, ...], least: int, most: int, factors: int, head: int
) -> None:
    """{1, m, J} up; down, a client without memory needs all factors that ever moved."""
    found = count(*setting, "method=fedtt_plus")
    assert found["trained"] == found["sent_up"] == [least + head, most + head]
    assert found["sent_down"][1] == factors + head
    assert least + head <= found["sent_down"][0] <= most + head
    assert found["trained_percent"] == pytest.approx(100 * (most + head) / found["total"])


def test_fedtt_plus_with_one_factor_and_biases() -> None:
    found = count(*LLAMA7B, "method=fedtt_plus", "method.active=one")
    # 64 adapters: axes 16 16 16 4 4 4 down and the reverse up, so ends of 80 and 20, else 25 k.
    assert found["trained"] == [64 * (80 + 20), 64 * (400 + 100)]
    biased = count(*LLAMA7B, "method=fedtt_plus", "method.train_bias=true")
    assert biased["trained"] == [44_800 + 64 * 4160] * 2


@pytest.mark.parametrize(
    ("setting", "factors", "head", "layers", "width"),
    [
        (BASE, 294_912, BASE_HEAD, 12, 768),
        (LARGE, 786_432, LARGE_HEAD, 24, 1024),
        (LLAMA7B, 4_194_304, 0, 32, 4096),
        (LLAMA13B, 6_553_600, 0, 40, 5120),
    ],
)
def test_the_lora_family(
    setting: tuple[str, ...], factors: int, head: int, layers: int, width: int
) -> None:
    """q and v, r = 8: A (8, d) and B (d, 8) twice a layer."""
    assert factors == layers * 2 * 2 * 8 * width
    assert count(*setting, "method=lora")["trained"] == [factors + head] * 2
    ffa = count(*setting, "method=ffa_lora")
    assert ffa["trained"] == ffa["sent_up"] == [factors // 2 + head] * 2


def test_fedsa_lora_trains_all_and_sends_a() -> None:
    personal = count(*BASE, "method=fedsa_lora")
    assert personal["trained"] == [294_912 + BASE_HEAD] * 2
    assert personal["sent_up"] == personal["sent_down"] == [147_456] * 2
    shared = count_on_meta(load_config([*BASE, "method=fedsa_lora", "personal=null"]))
    assert shared["trained"] == personal["trained"]
    assert shared["sent_up"] == [147_456 + BASE_HEAD] * 2


@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize(
    ("setting", "blocks", "widths", "head"),
    [
        (BASE, 12, 3072 + 768, BASE_HEAD),
        (LARGE, 24, 4096 + 1024, LARGE_HEAD),
        (LLAMA7B, 32, 11008 + 4096, 0),
    ],
)
def test_scl_has_r_times_f_plus_d_per_block(
    setting: tuple[str, ...], blocks: int, widths: int, head: int, rank: int
) -> None:
    found = count(*setting, "method=scl", f"method.rank={rank}")
    assert found["trained"] == found["sent_up"] == [rank * widths * blocks + head] * 2


@pytest.mark.parametrize("method", ["lora", "scl", "fedtt"])
@pytest.mark.parametrize(
    ("setting", "total"),
    [(BASE, 124_647_170), (LARGE, 355_361_794), (LLAMA7B, 6_738_415_616)],
)
def test_percentages_are_of_the_untouched_model(
    setting: tuple[str, ...], total: int, method: str
) -> None:
    """The published sizes: RoBERTa's encoder and head, Llama-2-7B's 6.74 B."""
    found = count(*setting, f"method={method}")
    assert found["total"] == total
    assert found["trained_percent"] == pytest.approx(100 * found["trained"][1] / total)


@pytest.mark.parametrize(
    ("setting", "ratio"), [(LLAMA7B, 10.3), (LLAMA13B, 11.2)], ids=["7b", "13b"]
)
def test_lora_has_so_many_times_fedtt_s_parameters(setting: tuple[str, ...], ratio: float) -> None:
    lora, fedtt = count(*setting, "method=lora"), count(*setting, "method=fedtt")
    assert round(lora["trained"][0] / fedtt["trained"][0], 1) == ratio


@pytest.mark.parametrize("method", ["fedex_lora", "flora", "flexlora", "hetlora", "fedrot_lora"])
def test_lora_s_relatives_train_and_send_what_it_does(method: str) -> None:
    found = count(*BASE, f"method={method}")
    assert found["trained"] == found["sent_up"] == [294_912 + BASE_HEAD] * 2
    # q and v of twelve layers come down whole after the first round, where the server changes them
    whole = 24 * 768**2 if method in ("fedex_lora", "flora") else 0
    assert found["sent_down"] == [294_912 + BASE_HEAD, 294_912 + BASE_HEAD + whole]


def test_fedsvd_sends_b_and_gets_both() -> None:
    found = count(*BASE, "method=fedsvd")
    assert found["trained"] == found["sent_up"] == [147_456 + BASE_HEAD] * 2
    assert found["sent_down"] == [147_456 + BASE_HEAD, 294_912 + BASE_HEAD]


@pytest.mark.parametrize(
    ("method", "numbers"),
    [("fed_sb", 64**2), ("ravan", 4 * 32**2 + 4)],
)
def test_cores_do_not_grow_with_the_width(method: str, numbers: int) -> None:
    found = count(*BASE, f"method={method}")
    assert found["trained"] == found["sent_up"] == [24 * numbers + BASE_HEAD] * 2
    bases = 24 * 2 * 64 * 768 if method == "fed_sb" else 0  # set by the server before round 1
    assert found["sent_down"] == [n + bases for n in found["sent_up"]]
    assert count(*LLAMA7B, f"method={method}")["trained"] == [64 * numbers] * 2


def test_slora_is_sparse_first_and_lora_then() -> None:
    """.0012 of 768 x 768 are 708."""
    found = count(*BASE, "method=slora")
    sparse, lora = 24 * 708, 294_912
    assert found["trained"] == found["sent_up"] == [sparse + BASE_HEAD, lora + BASE_HEAD]
    assert found["sent_down"] == [sparse + BASE_HEAD, sparse + lora + BASE_HEAD]
    late = count(*BASE, "method=slora", "method.sparse_rounds=30", "num_rounds=31")
    assert late["trained"] == found["trained"]  # also of the rounds after the 24th


def test_fedftg_sends_whole_mlps() -> None:
    found = count(*BASE, "method=fedftg")
    assert found["trained"] == found["sent_up"] == [24 * 768 * 3072 + BASE_HEAD] * 2


# --- the baselines of the papers, by hand --------------------------------------------------------

TRAINED_BASE = {  # counts for RoBERTa-base, d = 768, f = 3072, 12 blocks
    "rolora": 12 * 2 * 8 * 768 + BASE_HEAD,  # A or B in turn
    "full": 124_647_170,
    # q, k, v, o, 2 norms and W2 of width d, W1 of width f, in each block; the embeddings' norm
    "bitfit": 12 * (7 * 768 + 3072) + 768 + BASE_HEAD,
    "adapter": 24 * (2 * 768 * 64 + 64 + 768) + 25 * 2 * 768 + BASE_HEAD,
    "ia3": 12 * (2 * 768 + 3072) + BASE_HEAD,
    "prompt": 20 * 768 + BASE_HEAD,
    "fedprompt": 20 * 768 + BASE_HEAD,
    "p_tuning": 20 * 768 + 769 * 128 + 129 * 128 + 129 * 768 + BASE_HEAD,
    "prefix": 20 * 12 * 2 * 768 + BASE_HEAD,
    "federa": 294_912 + BASE_HEAD,
}
TRAINED_LLAMA = {  # counts for LLaMA-2-7B, d = 4096, f = 11008, 32 blocks, no biases
    "rolora": 32 * 2 * 8 * 4096,
    "full": 6_738_415_616,
    "adapter": 64 * (2 * 4096 * 64 + 64 + 4096) + 65 * 4096,
    "ia3": 32 * (2 * 4096 + 11008),
    "prompt": 20 * 4096,
    "fedprompt": 20 * 4096,
    "p_tuning": 20 * 4096 + 4097 * 128 + 129 * 128 + 129 * 4096,
    "prefix": 20 * 32 * 2 * 4096,
    "federa": 4_194_304,
}


@pytest.mark.parametrize("method", TRAINED_BASE)
def test_baselines_on_roberta_base(method: str) -> None:
    found = count(*BASE, f"method={method}")
    assert found["trained"] == found["sent_up"] == [TRAINED_BASE[method]] * 2
    later = 294_912 + BASE_HEAD if method == "rolora" else TRAINED_BASE[method]
    assert found["sent_down"] == [TRAINED_BASE[method], later]
    assert found["total"] == 124_647_170


@pytest.mark.parametrize("method", TRAINED_LLAMA)
def test_baselines_on_llama_2_7b(method: str) -> None:
    found = count(*LLAMA7B, f"method={method}")
    assert found["trained"] == found["sent_up"] == [TRAINED_LLAMA[method]] * 2


@pytest.mark.parametrize(("setting", "head"), [(BASE, BASE_HEAD), (LLAMA7B, 0)])
def test_feddpa_trains_two_loras_and_sends_one(setting: tuple[str, ...], head: int) -> None:
    lora = count(*setting, "method=lora")["trained"][0] - head
    found = count(*setting, "method=feddpa")
    assert found["trained"] == [2 * lora + head] * 2
    assert found["sent_up"] == found["sent_down"] == [lora + head] * 2


def test_bitfit_on_llama_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM has no biases in its blocks"):
        count(*LLAMA7B, "method=bitfit")


def test_prefix_counts_keys_and_values_of_shared_heads() -> None:
    """Qwen2.5-0.5B: 24 blocks, 2 heads of keys and values, 64 wide."""
    found = count("model=qwen2_5_0_5b", "data=docstrings_lm", "method=prefix")
    assert found["trained"] == [20 * 24 * 2 * 2 * 64] * 2


# --- bytes ---------------------------------------------------------------------------------------


def test_bytes_are_those_of_what_is_sent() -> None:
    """Four a number, also where the frozen base has two."""
    for more in ((), ("model.dtype=bfloat16", "precision=bf16")):
        found = count(*BASE, *more, "method=fedsa_lora")
        assert found["bytes_up"] == found["bytes_down"] == [4 * 147_456] * 2
    found = count(*BASE, "method=fedtt_plus")
    assert found["bytes_up"] == [4 * n for n in found["sent_up"]] == [61_192, 80_392]
    assert found["bytes_down"] == [4 * n for n in found["sent_down"]] == [80_392, 159_592]


def test_megabytes() -> None:
    assert span_of_bytes([242_536, 242_536]) == "0.243"
    assert span_of_bytes([61_192, 80_392]) == "0.061-0.080"
    assert span_of_bytes([16_777_216, 4_311_744_512]) == "16.777-4,311.745"


def test_the_command_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    params([*BASE, "method=fedtt_plus"])
    text = capsys.readouterr().out
    assert "MB up" in text and "0.061-0.080" in text
    assert "MB down" in text and "0.080-0.160" in text and "uncompressed" in text


# --- the table of sizes in the documentation ------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "sent.md").read_text()
TABLE = PAGE.partition("| method | RoBERTa-base: trained |")[2].partition("\n\n")[0]


def rows_of_the_page() -> dict[str, list[str]]:
    """The cells after a method's name, by method."""
    rows: dict[str, list[str]] = {}
    for line in TABLE.splitlines()[2:]:
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows |= dict.fromkeys(re.findall(r"`(\w+)`", names), cells)
    return rows


def as_cells(found: dict[str, Any]) -> list[str]:
    up, down = span_of_bytes(found["bytes_up"]), span_of_bytes(found["bytes_down"])
    sizes = up if up == down else f"{up} / {down}"
    return [span(found["trained"]), span(found["sent_up"]), sizes]


def test_the_page_has_every_method() -> None:
    assert sorted(re.findall(r"`(\w+)`", TABLE)) == names_in("method")


@pytest.mark.parametrize(("setting", "at"), [(BASE, 0), (LLAMA7B, 3)], ids=["base", "7b"])
def test_the_page_s_numbers(setting: tuple[str, ...], at: int) -> None:
    for method, cells in rows_of_the_page().items():
        if cells[at].startswith("refused: "):
            reason = cells[at].removeprefix("refused: ")
            with pytest.raises(ValueError, match=reason.replace("its", "(its|the)")):
                count(*setting, f"method={method}")
        else:
            assert cells[at : at + 3] == as_cells(count(*setting, f"method={method}")), method


def test_the_page_s_papers() -> None:
    """Their terms add up to what is trained."""
    known = {"head": BASE_HEAD}
    checked = 0
    for method, cells in rows_of_the_page().items():
        for at, sum_of in zip((0, 3), cells[6].split("; ") if cells[6] else (), strict=False):
            terms = [t if t not in known else f"{known[t]}" for t in sum_of.split(" + ")]
            spans = [[int(n.replace(",", "")) for n in term.split("-")] for term in terms]
            total = [sum(span[i] for span in spans) for i in (0, -1)]
            assert cells[at] == span(total), method
            checked += 1
    assert checked == 2 * 10  # lora_fair stands in LoRA's row


@pytest.mark.parametrize("method", ["lora", "fedtt", "fedtt_plus"])
def test_the_page_s_roberta_large(method: str) -> None:
    found = span(count(*LARGE, f"method={method}")["sent_up"])
    assert re.search(rf"RoBERTa-large sends up[^.]*{found} with `{method}`", PAGE)
