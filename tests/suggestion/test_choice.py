"""The rule by which a suggestion is chosen, on candidates whose costs and gains are made up."""

import itertools

import pytest

from randlora.suggestion.budget import Budget
from randlora.suggestion.candidates import Candidate, Targets
from randlora.suggestion.choice import choose

ALL, FEW = Targets("all-linear"), Targets(("q", "v"), few=True)


def candidate(method, numbers, memory, step, gain=None, targets=ALL, tasks=1):
    kind, _, rank = method.rpartition(" r=")
    return Candidate(
        method=method, kind=None if "LoRA" in kind else kind, r=int(rank), targets=targets, layers=3, alpha=1.0,
        peft_alpha=None, trainable_parameters=numbers, file_bytes=9 * numbers, file_bytes_without_projections=numbers,
        memory_bytes=memory, step=step, gains=() if gain is None else (gain,) * tasks,
    )  # fmt: skip


# Each of the first three takes the least of something.
NUMBERS = candidate("hadamard r=128", 100, 900, 1.3, 0.92)
BYTES = candidate("dense r=32", 900, 100, 1.3, 0.93)
SECONDS = candidate("very_sparse r=8", 900, 900, 1.1, 0.94)
BEST = candidate("hadamard r=8", 1000, 1000, 1.4, 1.0)
BAD = candidate("sparse r=128", 10, 10, 1.01, 0.5)
UNKNOWN = candidate("hadamard r=128", 5, 5, 1.01, None, FEW)
OWN = [NUMBERS, BYTES, SECONDS, BEST, BAD, UNKNOWN]


@pytest.mark.parametrize("order", [OWN, OWN[::-1]])
def test_of_what_is_as_good_it_is_what_takes_the_least(order):
    for text, expected in {"numbers": NUMBERS, "bytes": BYTES, "seconds": SECONDS}.items():
        choice = choose(order, Budget.of(text))
        assert choice.candidate is expected and "at least 90% of what the best" in choice.reason
        assert (choice.about_lora, choice.take_lora) == ("", False)
    # 100 * 900 * 1.3 twice: of all three together the one that gained 92% or 93%, whichever is first.
    assert choose(order, Budget()).candidate in (NUMBERS, BYTES)


def test_what_gained_less_is_not_suggested_however_little_it_takes():
    gains = {"0.92": NUMBERS, "0.9": candidate("dense r=8", 50, 50, 1.05, 0.9), "0.89": BAD}
    assert choose([BEST, *gains.values()], Budget.of("numbers")).candidate is gains["0.9"]
    nothing_gained = [candidate("dense r=8", 50, 50, 1.05, -0.5), candidate("dense r=32", 5, 5, 1.05, -0.6)]
    choice = choose(nothing_gained, Budget.of("numbers"))
    assert choice.candidate is nothing_gained[0] and "nothing that was measured gained anything" in choice.reason


def test_what_was_measured_on_fewer_tasks_is_not_compared():
    """On the one task of `lucky` the others may have gained as much."""
    lucky = candidate("dense r=8", 50, 50, 1.05, 1.0)
    two = [candidate("hadamard r=32", 100, 100, 1.2, 0.6, tasks=2), candidate("sparse r=8", 200, 90, 1.3, 0.6, tasks=2)]
    for order in ([lucky, *two], [*two, lucky]):
        choice = choose(order, Budget.of("numbers"))
        assert choice.candidate is two[0]
    assert choose([lucky, *two], Budget.of("numbers=99")).candidate is lucky  # alone within the limit
    lora = candidate("PEFT LoRA r=8", 10, 10, 1.0, 1.0)
    choice = choose([*two, lora], Budget.of("numbers"))
    assert not choice.take_lora and "not measured" in choice.about_lora
    lora = candidate("PEFT LoRA r=8", 10, 10, 1.0, 1.0, tasks=2)
    assert choose([*two, lora], Budget.of("numbers")).take_lora


def test_a_limit_leaves_out_what_takes_more_and_then_all_three_weigh_alike():
    assert choose(OWN, Budget.of("numbers=950")).candidate in (NUMBERS, BYTES)
    assert choose(OWN, Budget.of("numbers=899")).candidate is NUMBERS
    assert choose(OWN, Budget.of("bytes=899")).candidate is BYTES
    assert choose(OWN, Budget.of("seconds=1.29x")).candidate is SECONDS
    few_numbers, few_bytes = candidate("dense r=128", 100, 10_000, 1.1, 1.0), candidate("dense r=32", 900, 10, 1.1, 1.0)
    assert choose([few_numbers, few_bytes], Budget.of("numbers=950")).candidate is few_bytes
    # Within it 50% is the best, as nothing better was measured; and what was not measured comes last.
    assert choose(OWN, Budget.of("numbers=99")).candidate is BAD
    least = choose(OWN, Budget.of("numbers=9"))
    assert least.candidate is UNKNOWN and "numbers=9" in least.reason
    assert "no quality was measured on these layers alone" in least.reason
    with pytest.raises(
        ValueError, match=r"budget='numbers=4': the least is 5 trained numbers, with hadamard r=128 on q,v"
    ):
        choose(OWN, Budget.of("numbers=4"))
    lora = candidate("PEFT LoRA r=8", 3, 3, 1.0)
    with pytest.raises(ValueError, match=r"PEFT LoRA r=8 on all-linear is$"):
        choose([*OWN, lora], Budget.of("numbers=4"))


def unmeasured():
    for targets, kind, r in itertools.product((ALL, FEW), ("dense", "hadamard", "very_sparse"), (8, 32, 128)):
        factor = 1 if targets is ALL else 0.2
        price = {"dense": 1.2, "hadamard": 1.0, "very_sparse": 0.9}[kind]
        yield candidate(
            f"{kind} r={r}", int(1e6 / r * factor), int(1e7 * factor * price), 1 + 0.1 * price, None, targets
        )


def test_where_nothing_was_measured_it_is_the_usual_choice_or_the_least_of_kinds_that_fit_as_well():
    def chosen(text, found=None):
        choice = choose(list(unmeasured()) if found is None else found, Budget.of(text))
        assert "no quality was measured" in choice.reason
        return choice.candidate.method, choice.candidate.targets

    assert chosen(None) == ("hadamard r=32", ALL)
    assert chosen("numbers=20_000") == ("hadamard r=128", ALL)
    assert chosen("numbers=7e3") == ("hadamard r=32", FEW)
    assert chosen("numbers") == ("hadamard r=128", FEW)  # as many numbers as the others: of these it takes the least
    assert chosen("bytes")[0].startswith("hadamard") and chosen("seconds")[0].startswith("hadamard")
    assert "as in PEFT" in choose(list(unmeasured()), Budget()).reason
    sparse = [c for c in unmeasured() if c.kind == "very_sparse"]
    assert chosen("bytes", sparse)[0].startswith("very_sparse") and chosen(None, sparse) == ("very_sparse r=32", ALL)
    assert "the usual choice: very_sparse bases, and r = 32" in choose(sparse, Budget()).reason


def about_lora(text=None, *, gain, numbers=50, memory=50, step=1.05, own=NUMBERS):
    lora = [
        candidate("PEFT LoRA r=8", numbers, memory, step, gain),
        candidate("PEFT LoRA r=32", 10**6, 10**6, 9.0, gain),
    ]
    choice = choose([own, *lora], Budget.of(text))
    assert choice.candidate is own
    return choice.about_lora, choice.take_lora


def test_lora_is_called_the_better_choice_where_it_is():
    said, better = about_lora(gain=0.9)
    assert better and said.startswith("PEFT LoRA r=8 is the better choice, as it gained as much for less")
    assert "0.5 times the trained numbers" in said and "90% of the best gain, not 92%" in said
    assert about_lora("numbers", gain=0.9, memory=10**9)[1]  # of numbers it still takes less
    said, better = about_lora(gain=1.1, numbers=10**7)
    assert better and "as it gained more" in said

    said, better = about_lora(gain=0.8)  # cheaper, and worse
    assert not better and "80% of the best gain, not 92%" in said and "better" not in said
    assert not about_lora(gain=0.95, numbers=10**7)[1]  # as good, and dearer
    said, better = about_lora(gain=None)
    assert not better and "Which is better was not measured" in said
    assert about_lora("bytes=900", gain=0.9, memory=901) == ("", False)  # nothing of it is within the limit
    elsewhere = candidate("PEFT LoRA r=8", 1, 1, 1.0, 1.0, FEW)
    assert not choose([NUMBERS, elsewhere], Budget()).about_lora  # on other layers


@pytest.mark.parametrize("text, quantity, limit", [
    (None, None, None), ("numbers", "numbers", None), ("Bytes", "bytes", None), ("numbers=2e6", "numbers", 2e6),
    ("numbers=1.5M", "numbers", 1.5e6), ("numbers=200_000", "numbers", 2e5), ("bytes=8GiB", "bytes", 8 * 2**30),
    ("bytes = 8 GB", "bytes", 8e9), ("bytes=512mib", "bytes", 2**29), ("seconds=1.2x", "seconds", 1.2),
    ("numbers=1_000_000", "numbers", 1e6),
])  # fmt: skip
def test_budgets_are_read(text, quantity, limit):
    budget = Budget.of(text)
    assert (budget.quantity, budget.limit) == (quantity, limit)
    assert str(budget) == ("balanced" if text is None else text.strip())


@pytest.mark.parametrize("text, match", [
    ("memory", "one of numbers, bytes, seconds"), ("", "one of numbers"), ("bytes=", "such as bytes=8GiB"),
    ("bytes=-1", "greater than 0"), ("bytes=0", "greater than 0"), ("numbers=8GiB", "such as numbers=2e6"),
    ("seconds=0.5", "how many times as long"), ("bytes=1e999", "greater than 0"), ("numbers=2e6=3", "such as numbers"),
    *((f"numbers={limit}", "greater than 0, such as") for limit in ("1__0", "1_", "_1", "1_.5", "1.5.5", "nan")),
])  # fmt: skip
def test_other_budgets_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        Budget.of(text)


def test_a_budget_is_a_string():
    with pytest.raises(TypeError, match="got 8"):
        Budget.of(8)
