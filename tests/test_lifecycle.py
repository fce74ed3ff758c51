"""The lifecycle's rules one by one, and a long random walk in which none may ever be broken. No Triton, no clock."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.lifecycle.budget import Budget, Memory
from gateway.lifecycle.eviction import Frequency, Option, choose
from gateway.lifecycle.scheduler import Scheduler
from gateway.lifecycle.states import (
    AdminLoad,
    AdminPark,
    AdminUnload,
    Asked,
    CatalogChanged,
    Finished,
    Gone,
    Limits,
    Load,
    Loaded,
    LoadFailed,
    Lost,
    Park,
    Parked,
    Pin,
    Policy,
    Refuse,
    Start,
    State,
    Tick,
    Unload,
    Unloaded,
    Unpin,
    Wake,
    Why,
    Woken,
)
from tests import lifecycle_walk

GB = 2**30


def policy(gb=4, **changed):
    given = {"memory": Memory(gb * GB), "parked": Memory(GB // 4), "load_s": 10.0, "min_residency": 0.0}
    return Policy(**{**given, **changed})


class World:
    """A scheduler, and a clock that is set by hand. `do` sends an event that takes (…, now)."""

    def __init__(self, gb=16, limits=None, **policies):
        self.now = 0.0
        self.numbers = 0
        self.scheduler = Scheduler(Limits(Memory(gb * GB), **(limits or {})), policies, 0.0)

    def do(self, event, *given, **named):
        return self.scheduler.step(event(*given, now=self.now, **named))

    def ask(self, pipeline="a", seconds=100.0, **named):
        """The actions, and the request's name."""
        self.numbers += 1
        name = f"{pipeline}{self.numbers}"
        return self.do(Asked, name, pipeline, deadline=self.now + seconds, **named), name

    def ready(self, pipeline="a", took=0.0):
        """Loaded, with one request that runs; its name."""
        actions, request = self.ask(pipeline)
        self.now += took
        if actions == [Load(pipeline)]:
            actions = self.do(Loaded, pipeline)
        elif actions == [Wake(pipeline)]:
            actions = self.do(Woken, pipeline)
        assert Start(request, pipeline) in actions
        return request

    def idle(self, pipeline="a", took=0.0):
        return self.do(Finished, self.ready(pipeline, took))

    def at(self, now):
        self.now = now
        return self.do(Tick)

    def state(self, pipeline="a"):
        return self.scheduler.view(pipeline, self.now).state

    def view(self, pipeline="a"):
        return self.scheduler.view(pipeline, self.now)


def kinds(actions):
    return [type(action) for action in actions]


# Loading.


def test_the_first_request_loads_and_starts_when_it_is_ready():
    world = World(a=policy())
    assert world.state() is State.COLD
    actions, request = world.ask()
    assert actions == [Load("a")]
    assert world.state() is State.LOADING
    world.now = 8.0
    assert world.do(Loaded, "a", phases={"weights": 5.0}) == [Start(request, "a")]
    assert world.state() is State.READY
    assert world.view().load_s == 8.0
    assert world.view().phases == {"weights": 5.0}


def test_a_thousand_requests_are_one_load():
    world = World(a=policy(max_concurrency=1000))
    actions = [action for _ in range(1000) for action in world.ask()[0]]
    assert actions == [Load("a")]
    assert kinds(world.do(Loaded, "a")) == [Start] * 1000


def test_a_load_survives_the_client_that_began_it():
    world = World(a=policy(keep_alive=300))
    _, first = world.ask()
    assert world.do(Gone, first) == []
    assert world.state() is State.LOADING
    _, second = world.ask()
    assert world.do(Loaded, "a") == [Start(second, "a")]


def test_a_load_that_nobody_waits_for_any_more_is_kept_for_its_keep_alive():
    world = World(a=policy(keep_alive=300))
    _, first = world.ask()
    world.do(Gone, first)
    world.do(Loaded, "a")
    assert world.scheduler.next_tick == 300
    assert world.at(300) == [Park("a", Why.IDLE)]


def test_loads_come_one_after_the_other():
    world = World(a=policy(), b=policy(), c=policy())
    assert world.ask("a")[0] == [Load("a")]
    assert world.ask("b")[0] == []
    assert world.ask("c")[0] == []
    assert Load("b") in world.do(Loaded, "a")
    assert Load("c") in world.do(LoadFailed, "b", reason="no")


def test_two_at_once_where_that_is_allowed():
    world = World(a=policy(), b=policy(), c=policy(), limits={"max_loads": 2})
    assert [world.ask(name)[0] for name in "abc"] == [[Load("a")], [Load("b")], []]


def test_a_request_that_leaves_before_its_load_began_needs_no_load():
    world = World(a=policy(), b=policy())
    world.ask("a")
    _, other = world.ask("b")
    world.do(Gone, other)
    assert kinds(world.do(Loaded, "a")) == [Start]


# Order.


def test_interactive_comes_before_batch():
    world = World(a=policy(), batch=policy(), chat=policy())
    world.ask("a")
    world.ask("batch", batch=True)
    world.now = 1.0
    world.ask("chat")
    assert world.do(Loaded, "a")[-1] == Load("chat")


def test_batch_does_not_starve():
    world = World(a=policy(), batch=policy(), chat=policy(), limits={"batch_delay_s": 30.0})
    world.ask("a")
    world.ask("batch", batch=True)
    world.now = 31.0
    world.ask("chat")
    assert world.do(Loaded, "a")[-1] == Load("batch")


def test_priority_is_a_head_start():
    world = World(a=policy(), late=policy(priority=-1), early=policy())
    world.ask("a")
    world.ask("early")
    world.now = 5.0
    world.ask("late")
    assert world.do(Loaded, "a")[-1] == Load("late")


def test_all_waiters_of_a_pipeline_start_with_its_load_batch_or_not():
    world = World(a=policy())
    names = [world.ask(batch=batch)[1] for batch in (True, False, True)]
    started = [action.request for action in world.do(Loaded, "a")]
    assert started == [names[1], names[0], names[2]]


def test_max_concurrency_counts_places():
    world = World(a=policy(max_concurrency=3))
    _, first = world.ask(places=2)
    _, second = world.ask(places=2)
    _, large = world.ask(places=9)
    assert world.do(Loaded, "a") == [Start(first, "a")]
    assert world.do(Finished, first) == [Start(second, "a")]
    assert world.do(Gone, second) == [Start(large, "a")]  # more than there are: when all are free


def test_who_would_wait_behind_a_full_queue_is_refused_with_a_time():
    world = World(a=policy(max_concurrency=1, max_queue=1))
    running = world.ready()
    assert world.ask()[0] == []
    (refusal,), request = world.ask()
    assert (refusal.request, refusal.code) == (request, "overloaded")
    assert refusal.retry_after_s > 0
    assert kinds(world.do(Finished, running)) == [Start]


def test_a_quarter_of_the_queue_is_not_for_batch():
    world = World(a=policy(max_concurrency=1, max_queue=4))
    world.ready()
    assert [kinds(world.ask(batch=True)[0]) for _ in range(4)] == [[], [], [], [Refuse]]
    assert [kinds(world.ask()[0]) for _ in range(2)] == [[], [Refuse]]


def test_a_cold_pipeline_queues_what_it_will_start_at_once():
    world = World(a=policy(max_concurrency=2, max_queue=0))
    assert [kinds(world.ask()[0]) for _ in range(3)] == [[Load], [], [Refuse]]


# Deadlines.


def test_a_waiter_is_refused_at_its_deadline_with_the_time_that_is_left():
    world = World(a=policy(load_s=60.0))
    _, request = world.ask(seconds=20)
    assert world.scheduler.next_tick == 20
    (refusal,) = world.at(20)
    assert (refusal.request, refusal.code, refusal.retry_after_s) == (request, "unavailable", 40.0)
    assert "being loaded" in refusal.reason
    assert world.state() is State.LOADING


def test_waiting_for_a_place_to_its_deadline_is_a_timeout():
    world = World(a=policy(max_concurrency=1))
    world.ready()
    world.ask(seconds=5)
    (refusal,) = world.at(5)
    assert refusal.code == "timeout"


def test_all_that_are_late_are_told_so_before_anyone_starts():
    world = World(a=policy(max_concurrency=3))
    world.ready()
    late = [world.ask(seconds=5, places=3)[1], world.ask(seconds=5)[1]]
    _, patient = world.ask(seconds=50)
    actions = world.at(5)
    assert [action.request for action in actions] == [*late, patient]
    assert kinds(actions) == [Refuse, Refuse, Start]


def test_a_request_whose_time_is_over_is_not_begun():
    world = World(a=policy())
    assert kinds(world.ask(seconds=0)[0]) == [Refuse]
    assert world.state() is State.COLD


# Idleness.


def test_idle_is_parked_then_unloaded():
    world = World(a=policy(keep_alive=300, keep_parked=600))
    world.idle()
    assert world.scheduler.next_tick == 300
    assert world.at(299) == []
    assert world.at(300) == [Park("a", Why.IDLE)]
    assert world.do(Parked, "a", memory=Memory(GB)) == []
    assert world.view().memory == Memory(GB)
    assert world.state() is State.PARKED
    assert world.at(900) == [Unload("a", Why.IDLE)]
    assert world.state() is State.DRAINING
    assert world.do(Unloaded, "a") == []
    assert world.state() is State.COLD
    assert world.scheduler.memory_used == Memory()
    assert world.scheduler.next_tick is None


def test_a_parked_one_wakes():
    world = World(a=policy())
    world.idle()
    world.at(300)
    world.do(Parked, "a")
    actions, request = world.ask()
    assert actions == [Wake("a")]
    assert world.do(Woken, "a") == [Start(request, "a")]
    assert world.view().memory == Memory(4 * GB)


def test_a_request_that_comes_while_it_is_parked_waits_for_its_wake():
    world = World(a=policy())
    world.idle()
    world.at(300)
    actions, request = world.ask()
    assert actions == []
    assert world.do(Parked, "a") == [Wake("a")]
    assert world.do(Woken, "a") == [Start(request, "a")]


def test_what_cannot_be_parked_is_unloaded():
    world = World(a=policy(parked=None), b=policy(keep_parked=0))
    world.idle("a")
    world.idle("b")
    assert world.at(300) == [Unload("a", Why.IDLE), Unload("b", Why.IDLE)]


def test_a_use_is_not_idleness():
    world = World(a=policy(keep_alive=300))
    world.idle()
    world.now = 200.0
    request = world.ready()
    assert world.at(1000) == []
    world.do(Finished, request)
    assert world.scheduler.next_tick == 1300


@pytest.mark.parametrize(("asked", "due"), [(None, 300), (20, 300), (1000, 1000), (1e9, 3600)])
def test_a_request_may_lengthen_keep_alive_up_to_the_cap(asked, due):
    world = World(a=policy(keep_alive=300))
    world.idle()
    _, request = world.ask(keep_alive=asked)
    world.do(Finished, request)
    assert world.view().idle_until == due


def test_a_lone_request_may_shorten_it():
    world = World(a=policy(keep_alive=300))
    _, request = world.ask(keep_alive=0)
    world.do(Loaded, "a")
    assert world.do(Finished, request) == [Park("a", Why.IDLE)]


def test_a_pinned_one_is_loaded_unasked_and_stays():
    world = World(a=policy(pin=True))
    assert world.at(0) == [Load("a")]
    world.do(Loaded, "a")
    assert world.scheduler.next_tick is None
    assert world.at(1e6) == []
    world.do(Unpin, "a")
    assert world.state() is State.PARKED


# Memory.


def test_memory_is_reserved_before_the_load_and_corrected_after_it():
    world = World(a=policy(4))
    world.ask()
    assert world.scheduler.memory_used == Memory(4 * GB)
    world.do(Loaded, "a", memory=Memory(5 * GB))
    assert world.scheduler.memory_used == Memory(5 * GB)
    assert world.view().needs == Memory(5 * GB)


def test_what_can_never_fit_is_refused_at_once():
    world = World(16, a=policy(17))
    (refusal,), _ = world.ask()
    assert refusal.code == "unavailable"
    assert "17,408 MiB of RAM" in refusal.reason
    assert "16,384 MiB" in refusal.reason
    assert refusal.retry_after_s == 3600
    assert world.state() is State.COLD


def test_the_idle_one_worth_least_leaves():
    often, seldom = policy(4, parked=None, keep_alive=math.inf), policy(4, parked=None, keep_alive=math.inf)
    world = World(10, often=often, seldom=seldom, new=policy(4))
    world.idle("often", took=10)
    world.now = 400.0
    world.idle("seldom", took=10)
    world.idle("often")
    world.now = 1000.0
    assert world.ask("new")[0] == [Unload("seldom", Why.EVICTED)]
    assert world.do(Unloaded, "seldom") == [Load("new")]


def test_eviction_parks_where_that_is_enough():
    world = World(8, a=policy(4), b=policy(4), c=policy(3))
    world.idle("a", took=10)
    world.idle("b", took=10)
    actions, _ = world.ask("c")
    assert kinds(actions) == [Park]
    assert world.do(Parked, actions[0].pipeline) == [Load("c")]


def test_nobody_in_flight_pinned_or_young_is_evicted():
    world = World(12, busy=policy(4), pinned=policy(4, pin=True), young=policy(4, min_residency=20), new=policy(4))
    world.at(0)
    world.do(Loaded, "pinned")
    request = world.ready("busy")
    world.idle("young")
    assert world.ask("new", seconds=1000)[0] == []
    assert world.scheduler.next_tick == 20
    assert world.at(20) == [Unload("young", Why.EVICTED)] or world.state("young") is State.PARKED
    assert world.state("busy") is State.READY
    assert world.do(Finished, request) == []


def test_who_waits_for_the_busy_for_too_long_has_them_drained():
    world = World(4, {"patience_s": 30.0}, busy=policy(4), new=policy(4))
    request = world.ready("busy")
    world.ask("new", seconds=1000)
    assert world.scheduler.next_tick == 30
    assert world.at(30) == []
    assert world.state("busy") is State.DRAINING
    assert world.ask("busy", seconds=1000)[0] == []  # no new starts
    assert world.do(Finished, request) == [Unload("busy", Why.EVICTED)]
    assert world.do(Unloaded, "busy") == [Load("new")]
    assert kinds(world.do(Loaded, "new")) == [Start]


def test_waiters_without_room_are_told_why():
    world = World(4, a=policy(4, pin=True), b=policy(4))
    world.at(0)
    world.do(Loaded, "a")
    world.ask("b", seconds=5)
    (refusal,) = world.at(5)
    assert "it needs 4,096 MiB of RAM, and the models in memory leave no memory" in refusal.reason


def test_more_than_was_declared_makes_others_leave():
    world = World(8, a=policy(4, parked=None), b=policy(4))
    world.idle("a")
    world.ask("b")
    assert Unload("a", Why.EVICTED) in world.do(Loaded, "b", memory=Memory(6 * GB))


def test_gpu_and_ram_are_two_budgets():
    both = {"memory": Memory(GB, 6 * GB), "parked": Memory(6 * GB, 0), "min_residency": 0.0}
    world = World(a=Policy(**both), b=Policy(**both), limits={})
    world.scheduler = Scheduler(Limits(Memory(16 * GB, 8 * GB)), {"a": Policy(**both), "b": Policy(**both)}, 0.0)
    world.idle("a", took=10)
    assert world.ask("b")[0] == [Park("a", Why.EVICTED)]  # from the GPU to RAM
    assert world.scheduler.memory_used == Memory(6 * GB, 6 * GB)
    assert world.do(Parked, "a") == [Load("b")]
    assert world.scheduler.memory_used == Memory(7 * GB, 6 * GB)


def test_small_ones_may_pass_one_that_waits_in_vain_but_not_one_that_is_next():
    world = World(8, {"patience_s": 30.0}, busy=policy(6), large=policy(8), small=policy(2, keep_alive=1e9))
    request = world.ready("busy")
    world.ask("large", seconds=1000)
    assert world.ask("small")[0] == [Load("small")]
    world.do(Loaded, "small")
    for name in list(world.scheduler._requests._running):
        if name.startswith("small"):
            world.do(Finished, name)
    world.at(40)  # both leave for the large one
    assert world.state("busy") is State.DRAINING
    world.do(Unloaded, "small")
    assert world.ask("small", seconds=1000)[0] == []  # there is room, but it is promised
    world.do(Finished, request)
    assert world.do(Unloaded, "busy") == [Load("large")]


# Failure.


def test_a_failed_load_answers_its_waiters_with_the_reason_and_backs_off():
    world = World(a=policy(), limits={"backoff_s": 1.0, "max_backoff_s": 5.0})
    for backoff in (1, 2, 4, 5):
        actions, request = world.ask()
        assert actions == [Load("a")]
        (refusal,) = world.do(LoadFailed, "a", reason="corrupt weights")
        assert (refusal.request, refusal.code, refusal.retry_after_s) == (request, "unavailable", backoff)
        assert "corrupt weights" in refusal.reason
        assert world.state() is State.FAILED
        assert world.view().reason == "corrupt weights"
        world.now += backoff / 2
        (refusal,), _ = world.ask()
        assert refusal.retry_after_s == backoff / 2
        world.now += backoff / 2
    assert world.scheduler.memory_used == Memory()


def test_a_pinned_one_is_tried_again_unasked():
    world = World(a=policy(pin=True))
    world.at(0)
    world.do(LoadFailed, "a", reason="no")
    assert world.scheduler.next_tick == 1
    assert world.at(1) == [Load("a")]


def test_an_operator_need_not_wait_for_the_backoff():
    world = World(a=policy())
    world.ask()
    world.do(LoadFailed, "a", reason="no")
    assert world.do(AdminLoad, "a") == [Load("a")]


def test_one_that_dies_in_use_is_replaced_at_once_and_then_backs_off():
    world = World(a=policy(), b=policy())
    world.ask("b")  # another load does not hold it up
    world.do(Loaded, "b")
    request = world.ready()
    assert world.do(Lost, "a", reason="killed") == [Load("a")]
    assert world.do(Finished, request) == []  # it was over
    assert world.do(Asked, request, "a", deadline=99.0) == []  # tried again
    assert world.do(Loaded, "a") == [Start(request, "a")]
    assert world.do(Lost, "a", reason="killed") == []
    assert world.state() is State.FAILED


def test_a_stable_one_has_its_failures_forgotten():
    world = World(a=policy())
    world.ready()
    world.do(Lost, "a", reason="killed")
    world.do(Loaded, "a")
    world.now = 61.0
    assert world.do(Lost, "a", reason="killed") == [Load("a")]


# The catalog and the operator.


def test_an_unknown_model_is_not_found():
    world = World(a=policy())
    (refusal,), _ = world.ask("b")
    assert refusal.code == "model_not_found"


def test_an_added_one_is_served():
    world = World(a=policy())
    world.do(CatalogChanged, policies={"b": policy()})
    assert world.ask("b")[0] == [Load("b")]


def test_a_removed_one_ends_its_streams_first():
    world = World(a=policy(max_concurrency=1))
    request = world.ready()
    _, waiting = world.ask()
    (refusal,) = world.do(CatalogChanged, removed=frozenset("a"))
    assert (refusal.request, refusal.code) == (waiting, "model_not_found")
    assert [view.pipeline for view in world.scheduler.views(0)] == []
    assert kinds(world.ask()[0]) == [Refuse]
    assert world.do(Finished, request) == [Unload("a", Why.CATALOG)]
    assert world.do(Unloaded, "a") == []
    assert world.scheduler.memory_used == Memory()


def test_a_changed_one_is_drained_and_loaded_anew():
    world = World(a=policy(version="1"))
    request = world.ready()
    assert world.do(CatalogChanged, policies={"a": policy(6, version="2")}) == []
    _, later = world.ask()
    assert world.do(Finished, request) == [Unload("a", Why.CATALOG)]
    assert world.do(Unloaded, "a") == [Load("a")]
    assert world.scheduler.memory_used == Memory(6 * GB)
    assert world.do(Loaded, "a") == [Start(later, "a")]


def test_a_change_during_the_load_is_loaded_after_it():
    world = World(a=policy(version="1"))
    _, request = world.ask()
    assert world.do(CatalogChanged, policies={"a": policy(version="2")}) == []
    assert world.do(Loaded, "a") == [Unload("a", Why.CATALOG)]
    assert world.do(Unloaded, "a") == [Load("a")]
    assert world.do(Loaded, "a") == [Start(request, "a")]


def test_other_terms_of_the_same_version_need_no_reload():
    world = World(a=policy(max_concurrency=1))
    world.ready()
    _, waiting = world.ask()
    assert world.do(CatalogChanged, policies={"a": policy(max_concurrency=2)}) == [Start(waiting, "a")]


def test_a_mended_declaration_is_tried_at_once():
    world = World(a=policy(version="1"))
    world.ask()
    world.do(LoadFailed, "a", reason="no such file")
    world.do(CatalogChanged, policies={"a": policy(version="2")})
    assert world.ask()[0] == [Load("a")]


def test_the_operators_words():
    world = World(a=policy())
    assert world.do(AdminLoad, "a") == [Load("a")]
    world.do(Loaded, "a")
    assert world.do(AdminPark, "a") == [Park("a", Why.ADMIN)]
    world.do(Parked, "a")
    assert world.do(AdminLoad, "a") == [Wake("a")]
    world.do(Woken, "a")
    world.do(Pin, "a")
    assert world.at(1e6) == []
    request = world.ready()
    assert world.do(AdminUnload, "a") == []
    assert world.state() is State.DRAINING
    assert world.do(Finished, request) == [Unload("a", Why.ADMIN)]
    assert world.do(Unloaded, "a") == []
    assert not world.view().pinned


def test_a_pin_takes_back_a_drain():
    world = World(4, {"patience_s": 1.0}, a=policy(4), b=policy(4))
    request = world.ready("a")
    world.ask("b")
    world.at(1)
    assert world.state("a") is State.DRAINING
    world.do(Pin, "a")
    assert world.state("a") is State.READY
    assert world.do(Finished, request) == []


# How long it takes.


def test_eta_is_of_the_loads_before_it_too():
    world = World(a=policy(load_s=10), b=policy(load_s=20), c=policy(load_s=5), d=policy(load_s=1))
    for name in "abc":
        world.ask(name)
    world.now = 4.0
    assert [world.scheduler.eta(name, 4.0) for name in "abcd"] == [6.0, 26.0, 31.0, 32.0]
    world.now = 30.0  # overdue
    assert world.scheduler.eta("a", 30.0) == 1.0
    world.do(Loaded, "a")
    assert world.scheduler.eta("a", 30.0) == 0.0
    assert world.scheduler.eta("b", 30.0) == 20.0


def test_eta_follows_the_measured():
    world = World(a=policy(load_s=10))
    for seconds in (4.0, 8.0):
        world.do(AdminLoad, "a")
        world.now += seconds
        world.do(Loaded, "a")
        world.do(AdminUnload, "a")
        world.do(Unloaded, "a")
    assert world.scheduler.eta("a", world.now) == 6.0


# Parts.


def test_a_budget_does_not_give_what_it_has_not():
    budget = Budget(Memory(10, 5))
    budget.reserve("a", Memory(6, 5))
    with pytest.raises(ValueError, match="b cannot have"):
        budget.reserve("b", Memory(1, 1))
    budget.correct("a", Memory(12, 0))
    assert budget.excess == Memory(2, 0)
    budget.reserve("c", Memory(0, 5))
    with pytest.raises(ValueError, match="d cannot have"):
        budget.reserve("d", Memory(1, 0))
    budget.release("a")
    assert budget.free == Memory(10, 0)


def option(name, freed, rate=1.0, back_s=1.0, unload=True):
    return Option(name, unload, Memory(*freed), rate, back_s)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([option("seldom", (4,), rate=0.1), option("often", (4,))], ["seldom"]),
        ([option("quick", (4,), back_s=0.1), option("slow", (4,))], ["quick"]),
        ([option("small", (4,)), option("large", (8,))], ["large"]),
        ([option("small", (2,), rate=0.01), option("large", (4,))], ["large"]),  # and the small one is then needless
        ([option("gpu", (0, 9), rate=0.0), option("ram", (4,))], ["ram"]),  # only of what is short
        ([option("small", (2,))], []),
    ],
)
def test_who_leaves(options, chosen):
    assert [option.name for option in choose(options, Memory(4), Memory(16, 16))] == chosen


def test_parking_gives_way_to_unloading_where_it_is_not_enough():
    ways = [option("a", (4,), back_s=10), option("a", (3,), back_s=1, unload=False)]
    assert choose(ways, Memory(3), Memory(16)) == [ways[1]]
    assert choose(ways, Memory(4), Memory(16)) == [ways[0]]


def test_what_parking_costs_in_ram_is_not_forgotten():
    ways = [option("a", (1, 4), back_s=10), option("a", (-4, 4), back_s=1, unload=False)]
    assert choose(ways, Memory(1, 4), Memory(16, 16)) == [ways[0]]


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 10), st.floats(0.1, 10)), max_size=8), st.integers(1, 30))
def test_what_is_chosen_suffices_and_nothing_of_it_is_needless(drawn, shortage):
    options = [option(str(n), (size,), rate, back) for n, (size, rate, back) in enumerate(drawn)]
    freed = [chosen.freed.ram for chosen in choose(options, Memory(shortage), Memory(100))]
    if sum(size for size, _, _ in drawn) < shortage:
        assert freed == []
    else:
        assert sum(freed) >= shortage
        assert all(sum(freed) - one < shortage for one in freed)


def test_frequency_counts_visits_and_forgets():
    often, once, long_ago, several = (Frequency(86400.0) for _ in range(4))
    assert often.rate(0.0) == 0.0
    for hour in range(10):
        often.hit(hour * 3600.0)
    long_ago.hit(0.0)
    once.hit(36000.0)
    assert often.rate(36000.0) > long_ago.rate(36000.0)
    assert once.rate(36001.0) > often.rate(36001.0)  # its visit may go on
    assert once.rate(36000.0 + 7200.0) < often.rate(36000.0 + 7200.0)
    for second in range(100):
        several.hit(36000.0 + second / 100)
    assert math.isclose(several.rate(36001.0), once.rate(36001.0), rel_tol=0.02)  # one visit


# All together.


@pytest.mark.parametrize("seed", range(7, 12))
def test_a_walk(seed):
    """A million transitions, in five walks."""
    edges, refusals, starts = lifecycle_walk.walk(200_000, seed=seed)
    assert starts > 10_000
    assert set(refusals) == {"model_not_found", "unavailable", "timeout", "overloaded"}
    reached = {was for was, _, _ in edges} | {now for _, _, now in edges}
    states = {
        "cold",
        "loading",
        "ready",
        "parked+park",
        "parked",
        "parked+wake",
        "draining",
        "draining+unload",
        "failed",
    }
    assert states <= reached
    for edge in [
        ("loading", "Loaded", "ready"),
        ("loading", "LoadFailed", "failed"),
        ("parked+park", "Parked", "parked"),
        ("parked+wake", "Woken", "ready"),
        ("draining", "Finished", "draining+unload"),
        ("draining+unload", "Unloaded", "cold"),
        ("draining+unload", "Unloaded", "loading"),
        ("ready", "Lost", "loading"),
        ("ready", "Lost", "failed"),
        ("draining", "Pin", "ready"),
        ("draining+unload", "Unloaded", "gone"),
    ]:
        assert edges[edge], f"{edge} did not happen"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**60))
def test_any_walk(seed):
    lifecycle_walk.walk(300, seed)
