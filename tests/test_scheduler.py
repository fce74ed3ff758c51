"""The scheduler with a cache of plain lists: whatever arrives and leaves, each row's slot holds that row's tokens."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.engine import Request
from pipelines.engine.scheduler import (
    ALONE,
    BESIDE,
    GRAIN,
    LEAST_SHARED,
    MAX_KEPT,
    Row,
    Scheduler,
    as_many,
    by_position,
    by_rectangle,
)
from pipelines.sampling import Sampling


class Lists:
    """Slots as lists of the tokens whose keys and values they would hold."""

    def __init__(self):
        self.slots = {}

    def copy(self, source, target, length):
        assert source != target
        self.slots[target] = self.slots.get(source, [])[:length] + self.slots.get(target, [])[length:]

    def swap(self, one, other, length):
        first, second = self.slots.get(one, []), self.slots.get(other, [])
        self.slots[one], self.slots[other] = second[:length] + first[length:], first[:length] + second[length:]

    def write(self, slot, start, tokens):
        held = self.slots.setdefault(slot, [])
        assert len(held) >= start, "a position was left out"
        held[start : start + len(tokens)] = tokens


class Driver:
    """An engine without a model: the next token of a row is a number made of its tokens."""

    def __init__(self, *, capacity=10_000, max_running=4, share=True, chunked=True, charge=by_position):
        self.cache = Lists()
        self.scheduler = Scheduler(self.cache, capacity, max_running, share=share, chunked=chunked, charge=charge)
        self.number = 0
        self.ended = {}

    def submit(self, name, prompt, count, priority=0):
        request = Request(name, prompt, Sampling(), priority=priority)
        self.scheduler.submit(Row(request, (priority, self.number), list(prompt), len(prompt) + count))
        self.number += 1

    def step(self):
        plan = self.scheduler.plan()
        self.check()
        for slot, row in enumerate(plan.decode):
            assert self.scheduler.running[slot] is row
            assert row.decodes
            self.cache.write(slot, row.computed, row.tokens[-1:])
        for chunk in plan.chunks:
            assert self.scheduler.running[chunk.slot] is chunk.row
            assert chunk.start == chunk.row.computed
            self.cache.write(chunk.slot, chunk.start, chunk.row.tokens[chunk.start : chunk.start + chunk.length])
        rows = plan.sampled
        plan.advance()
        for row in rows:
            row.tokens.append(next_token(row.tokens))
            if len(row.tokens) >= row.limit:
                row.finish_reason = "length"
                self.ended[row.request.id] = row
        self.scheduler.retire()
        self.check()
        return plan

    def cancel(self, name):
        for row in self.scheduler.end(lambda row: "cancelled" if row.request.id == name else ""):
            self.ended[row.request.id] = row

    def check(self):
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_running
        for slot, row in enumerate(scheduler.running):
            assert self.cache.slots.get(slot, [])[: row.computed] == row.tokens[: row.computed]
        for slot, tokens in scheduler.kept.items():
            assert len(scheduler.running) <= slot < scheduler.slots
            assert self.cache.slots[slot][: len(tokens)] == tokens
        assert len(scheduler.kept) <= MAX_KEPT
        lengths = [row.computed for row in scheduler.running] + list(scheduler.kept_lengths.values())
        assert scheduler.charge(lengths) <= scheduler.capacity

    def drain(self, steps=5000):
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            steps -= 1
            assert steps, "it does not come to an end"


def next_token(tokens):
    return (sum(tokens[-3:]) * 7 + len(tokens)) % 50


def alone(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


def prompt(length, first=0):
    return [(first + place * place) % 50 for place in range(length)]


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it
        st.sampled_from([0, 0, 0, 1]),  # its beginning is one of two
        st.integers(0, 90),  # so many tokens of that
        st.integers(1, 40),  # and so many of its own
        st.integers(1, 40),  # to generate
        st.integers(-1, 1),  # priority
        st.sampled_from([None, None, None, 0, 2, 9]),  # cancelled so many steps after
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(
    arrivals=ARRIVALS,
    capacity=st.sampled_from([192, 256, 512, 4096]),
    max_running=st.integers(1, 6),
    share=st.booleans(),
    chunked=st.booleans(),
    rectangle=st.booleans(),
)
def test_all_end_as_they_would_alone_and_the_limits_hold(arrivals, capacity, max_running, share, chunked, rectangle):
    driver = Driver(
        capacity=capacity,
        max_running=max_running,
        share=share,
        chunked=chunked,
        charge=by_rectangle if rectangle else by_position,
    )
    wanted, cancels = {}, {}
    for number, (wait, which, common, own, count, priority, cancelled) in enumerate(arrivals):
        for _ in range(wait):
            driver.step()
            for name in [name for name, left in cancels.items() if left == 0]:
                driver.cancel(name)
            cancels = {name: left - 1 for name, left in cancels.items()}
        name, tokens = str(number), prompt(common, which) + prompt(own, number + 2)
        driver.submit(name, tokens, count, priority)
        wanted[name] = alone(tokens, count)
        if cancelled is not None:
            cancels[name] = cancelled
    driver.drain()
    assert driver.ended.keys() == wanted.keys()
    for name, row in driver.ended.items():
        if row.finish_reason == "cancelled":
            assert row.tokens == wanted[name][: len(row.tokens)]
        else:
            assert row.tokens == wanted[name]
    if not share:
        assert not driver.scheduler.kept
        assert not driver.scheduler.cached_tokens


def test_a_long_prompt_never_keeps_a_running_row_from_its_token():
    driver = Driver()
    driver.submit("runs", prompt(5), 200)
    driver.step()
    driver.submit("long", prompt(1000, 1), 3)
    steps = 0
    while "long" not in driver.ended:
        plan = driver.step()
        assert [row.request.id for row in plan.decode][:1] == ["runs"]
        assert sum(chunk.length for chunk in plan.chunks) <= BESIDE
        steps += 1
    assert steps == -(-1000 // BESIDE) + 2


def test_alone_a_prompt_comes_in_large_chunks():
    driver = Driver()
    driver.submit("long", prompt(1000), 3)
    assert [chunk.length for chunk in driver.step().chunks] == [ALONE]
    assert [chunk.length for chunk in driver.step().chunks] == [1000 - ALONE]
    assert not driver.step().chunks


def test_several_prompts_share_a_step():
    driver = Driver(max_running=64)
    for number in range(20):
        driver.submit(str(number), prompt(40, number), 5)
    assert [chunk.length for chunk in driver.step().chunks] == [40] * 12 + [32]
    plan = driver.step()
    assert len(plan.decode) == 12
    assert [(chunk.start, chunk.length) for chunk in plan.chunks] == [(32, 8), (0, 24)]


def test_a_prompt_that_begins_as_an_earlier_one_computes_the_rest_only():
    driver = Driver()
    driver.submit("first", prompt(100), 10)
    driver.drain()
    driver.submit("same", prompt(100), 10)
    plan = driver.step()
    assert not plan.chunks, "all but the last token was there, and that decodes"
    driver.submit("longer", [*driver.ended["first"].tokens, 1, 2, 3], 10)
    driver.submit("other", [9, *prompt(100)], 10)
    driver.drain()
    cached = {name: row.cached_tokens for name, row in driver.ended.items()}
    assert cached == {"first": 0, "same": 99, "longer": 109, "other": 0}
    assert driver.scheduler.cached_tokens == 208
    assert driver.scheduler.prompt_tokens == 100 + 100 + 113 + 101


def test_a_running_row_shares_its_prompt_with_those_that_come_after():
    driver = Driver()
    driver.submit("first", prompt(100), 50)
    driver.step()
    driver.step()
    driver.submit("second", [*prompt(90), 7], 5)
    driver.drain()
    assert driver.ended["second"].cached_tokens == 90


def test_prompts_that_arrive_together_are_computed_once():
    """Four answers to one prompt, and a burst of requests with one system prompt."""
    driver = Driver(max_running=8)
    for number in range(4):
        driver.submit(str(number), prompt(600), 5)
    driver.submit("other", prompt(20, 3), 5)
    driver.drain()
    assert [driver.ended[str(number)].cached_tokens for number in range(4)] == [0, 599, 599, 599]
    assert driver.ended["other"].cached_tokens == 0


def test_a_short_common_beginning_is_computed_again():
    driver = Driver()
    for name in "ab":
        driver.submit(name, prompt(LEAST_SHARED - 1) + [ord(name)] * 20, 2)
        driver.drain()
    assert driver.ended["b"].cached_tokens == 0


def test_when_room_runs_out_the_last_to_come_waits_and_its_answer_is_the_same():
    driver = Driver(capacity=4 * GRAIN, share=False)
    for name in "ab":
        driver.submit(name, prompt(GRAIN - 2, ord(name)), 100)
    driver.step()
    order = []
    while driver.scheduler.running or driver.scheduler.waiting:
        plan = driver.step()
        order.append("".join(row.request.id for row in plan.decode))
    assert driver.scheduler.preempted == 1
    assert [order[0], order[-1]] == ["ab", "b"]
    assert "a" in order
    for name in "ab":
        assert driver.ended[name].tokens == alone(prompt(GRAIN - 2, ord(name)), 100)


def test_what_is_kept_goes_before_anybody_waits():
    driver = Driver(capacity=4 * GRAIN)
    driver.submit("old", prompt(GRAIN), 2)
    driver.drain()
    assert driver.scheduler.kept
    driver.submit("new", prompt(2 * GRAIN, 3), 2 * GRAIN)
    driver.drain()
    assert driver.scheduler.preempted == 0
    assert [row.tokens[:5] for row in driver.ended.values()] == [prompt(5), prompt(5, 3)]


def test_the_lowest_priority_number_is_first_and_then_who_came_first():
    driver = Driver(max_running=1)
    for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", -1)]:
        driver.submit(name, prompt(3), 1, priority)
    driver.drain()
    assert "".join(driver.ended) == "dacb"


def test_nobody_overtakes_one_that_does_not_fit_yet():
    driver = Driver(capacity=4 * GRAIN, max_running=4, share=False)
    driver.submit("runs", prompt(2 * GRAIN), 20)
    driver.step()
    driver.submit("large", prompt(3 * GRAIN, 1), 5)
    driver.submit("small", prompt(5, 2), 5)
    large, small = sorted(driver.scheduler.waiting)
    waited = 0
    while not large.admitted:
        driver.step()
        waited += 1
        assert large.admitted or not small.admitted
    assert waited > 10
    driver.drain()
    assert driver.ended.keys() == {"runs", "large", "small"}


def test_rows_that_wait_can_leave():
    driver = Driver(max_running=1)
    for name in "abc":
        driver.submit(name, prompt(3), 3)
    driver.step()
    driver.cancel("b")
    driver.drain()
    assert "".join(driver.ended) == "bac"
    assert driver.ended["b"].tokens == prompt(3)


def test_beside_many_rows_a_chunk_is_as_many_tokens():
    driver = Driver(max_running=64)
    for number in range(BESIDE + 8):
        driver.submit(str(number), [number, *prompt(3)], 50)
    driver.step()
    driver.submit("long", prompt(500, 1), 3)
    plan = driver.step()
    assert len(plan.decode) == sum(chunk.length for chunk in plan.chunks) == BESIDE + 8


def test_on_the_kernels_prompt_and_rows_fill_whole_tiles():
    assert [as_many(rows) for rows in (1, 3, 4, 5, 8, 16, 17)] == [7, 5, 4, 11, 8, 16, 23]
    assert all((rows + as_many(rows)) % 8 == 0 and rows <= as_many(rows) for rows in range(1, 100))


def test_a_prompt_is_shared_by_identity_not_by_its_ids():
    """Two pictures stand as the same placeholder tokens: what was computed of one is not the other's beginning."""
    prompt = [1] * 20 + [9] * 20 + [2] * 10
    scheduler = Scheduler(Lists(), 1000, 4)
    rows = []
    for number, picture in enumerate([-5, -5, -6]):
        identity = [1] * 20 + [picture] * 20 + [2] * 10
        request = Request(str(number), prompt, Sampling(), identity=identity)
        rows.append(Row(request, (0, number), list(prompt), 50))
        scheduler.submit(rows[-1])
        while scheduler.waiting or any(not row.decodes for row in scheduler.running):
            plan = scheduler.plan()
            plan.advance()
            for row in plan.sampled:
                row.tokens.append(3)
    assert [row.cached_tokens for row in rows] == [0, 49, 20]
