import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardmodel.errors import InputError
from rewardmodel.model.budget import CPU_TOKENS, MAX_TOKENS, SHARE, Memory, find_budget, out_of_memory_error

MIB = 2**20


class Linear:
    """A device on which a batch takes `fixed` bytes and `each` more a token, and that has so many bytes free."""

    def __init__(self, free: int, fixed: int, each: int, longest: int) -> None:
        self.bytes, self.fixed, self.each, self.longest = free, fixed, each, longest
        self.asked = []

    def cost(self, tokens: int) -> int:
        return self.fixed + self.each * tokens

    def free(self) -> int:
        return self.bytes

    def peak(self, work) -> int:
        work()
        taken = self.cost(self.asked[-1] * self.longest)
        if taken > self.bytes:
            raise torch.OutOfMemoryError
        return taken

    def budget(self) -> int:
        return find_budget(self, self.asked.append, self.longest)


@settings(deadline=None, max_examples=200)
@given(
    longest=st.integers(1, 4096),
    each=st.integers(1, 64 * MIB),
    own=st.floats(0, 1),
    rows=st.floats(1 / SHARE, 1000),
)
def test_a_budget_fits_into_the_share_and_uses_it(longest, each, own, rows):
    fixed = int(own * each * longest)
    memory = Linear(int(rows * (fixed + each * longest)) + 1, fixed, each, longest)
    found = memory.budget()
    fits = (SHARE * memory.bytes - fixed) / each
    assert longest <= found <= max(longest, MAX_TOKENS)
    assert memory.cost(found) <= SHARE * memory.bytes
    assert found >= min(fits / 2, MAX_TOKENS)
    assert memory.asked == [1, 2]


@settings(deadline=None, max_examples=200)
@given(
    longest=st.integers(1, 4096),
    each=st.integers(1, 64 * MIB),
    fixed=st.integers(0, 2**40),
    rows=st.floats(1, 1000),
)
def test_a_budget_never_fills_more_than_the_share_but_for_one_row(longest, each, fixed, rows):
    memory = Linear(int(rows * (fixed + each * longest)) + 1, fixed, each, longest)
    found = memory.budget()
    assert found == longest or memory.cost(found) <= SHARE * memory.bytes


def test_the_budget_of_a_known_example(caplog):
    caplog.set_level(logging.INFO, logger="rewardmodel.model.budget")
    # A row of 1,000 tokens takes 1.1 GB, and each more of them 1 GB: 17 GB of 20 are 100 MB and 16,900 tokens.
    memory = Linear(20_000_000_000, fixed=100_000_000, each=1_000_000, longest=1000)
    assert memory.budget() == 16_900
    assert memory.asked == [1, 2]
    assert "16,900 tokens a batch fit: 18.6 GiB free, 0.95 MiB a token" in caplog.text


def test_a_battle_that_does_not_fit_alone_is_refused_with_what_to_do():
    memory = Linear(10**9, fixed=0, each=10**6, longest=2048)
    with pytest.raises(InputError, match=r"a battle of 2,048 tokens does not fit .* smaller prompt\.max_length") as got:
        memory.budget()
    assert memory.asked == [1]
    assert isinstance(got.value.__cause__, torch.OutOfMemoryError)
    assert str(got.value) == str(out_of_memory_error(2048))


def test_where_two_rows_do_not_fit_a_batch_is_one():
    memory = Linear(1_900_000_000, fixed=0, each=10**6, longest=1000)
    assert memory.budget() == 1000
    assert memory.asked == [1, 2]


def test_a_batch_is_never_more_than_makes_it_faster():
    assert Linear(10**15, fixed=0, each=1000, longest=500).budget() == MAX_TOKENS


def test_a_row_that_is_longer_than_any_batch_has_one_of_its_own():
    longest = 2 * MAX_TOKENS
    assert Linear(10**15, fixed=0, each=1000, longest=longest).budget() == longest


def test_memory_that_the_second_row_does_not_need_is_not_divided_by():
    class Flat(Linear):
        def cost(self, tokens: int) -> int:
            return 10**6

    # At least half of the first row is reckoned for each more: 1 + (850 - 1) / 0.5 rows of ten tokens.
    assert Flat(10**9, fixed=0, each=0, longest=10).budget() == 10 * (1 + 2 * 849)


def test_a_cpu_has_a_fixed_budget_and_computes_nothing():
    assert find_budget(None, lambda rows: pytest.fail("computed"), longest=10_000) == CPU_TOKENS


class Cuda:
    """Counts what torch.cuda is asked: memory allocated now and at most, and the order of calls."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.most, self.calls = 700, 5000, []
        for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.calls.append("empty_cache"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.calls.append("info"), (123, 1000))[1])

    def synchronize(self, device) -> None:
        self.calls.append("synchronize")

    def reset_peak_memory_stats(self, device) -> None:
        self.most = self.now

    def memory_allocated(self, device) -> int:
        return self.now

    def max_memory_allocated(self, device) -> int:
        return self.most

    def work(self) -> None:
        self.calls.append("work")
        self.most = max(self.most, self.now + 300)
        self.now += 50  # stays: gradients


def test_the_peak_of_work_is_what_it_takes_beyond_what_was_taken(monkeypatch):
    cuda = Cuda(monkeypatch)
    memory = Memory(torch.device("cuda", 0))
    assert memory.peak(cuda.work) == 300
    assert cuda.calls == ["synchronize", "work", "synchronize"]
    assert memory.peak(cuda.work) == 300


def test_free_memory_includes_what_the_allocator_keeps(monkeypatch):
    cuda = Cuda(monkeypatch)
    assert Memory(torch.device("cuda", 0)).free() == 123
    assert cuda.calls == ["empty_cache", "info"]
