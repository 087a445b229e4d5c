"""Several processes train what one process trains: DDP, FSDP2 and HSDP over gloo, on the CPU."""

from functools import cache
from types import SimpleNamespace

import distributed_runs as work
import pytest
import torch
from processes import run_ranks
from torch.distributed.tensor import Shard

from safeopt.distributed import ALONE, Layout, _part

pytestmark = pytest.mark.slow

FLOAT32 = {"dtype": torch.float32}
# What is trained in which layouts, by the number of ranks.
PULLED = {"elastic": 0.5}
CASES = {
    2: [
        ("ddp", "ProjectedAdamW", PULLED),
        ("ddp", "safeguard(SGD)", FLOAT32),
        ("ddp", "ProjectedAdamW", {"basis": "compressed"}),
        ("fsdp", "ProjectedAdamW", PULLED),
        ("fsdp", "safeguard(SGD)", FLOAT32),
        ("fsdp", "ProjectedAdamW", {"curvature": "random"}),
    ],
    # The longer the window, the more of its few examples stand in it twice: of nearly equal rows
    # rounding decides which direction is kept.
    3: [
        ("ddp", "ProjectedAdamW", {"lora": True, "window": 14, "elastic": 0.0}),
        ("fsdp", "ProjectedAdamW", {"lora": True, "window": 14, "elastic": 0.0}),
        ("fsdp", "PreconditionedSGD", {}),
        ("fsdp", "SafetySAM", {"mode": "lookahead"}),
    ],
    4: [("hsdp", "ProjectedAdamW", PULLED)],
}
# Checkpoints: optimizer, the step at which it is saved, options.
SAVED = {"plain": ("ProjectedAdamW", 9, PULLED), "lora": ("SafetySAM", 9, {"lora": True})}
REPLICATED = ("ProjectedAdamW", 15, PULLED)
KINDS = [case[1:] for cases in CASES.values() for case in cases]
KINDS += [(name, options) for name, _, options in SAVED.values()]
# Everything else, by the number of ranks; 0 stands for one process without a group.
TASKS = {
    0: {f"whole {key}": (work.resume_whole, key, *SAVED[key]) for key in SAVED},
    1: {
        "resume fsdp": (work.resume, "plain", "fsdp", *SAVED["plain"]),
        "resume one": (work.resume, "lora", "one", *SAVED["lora"]),
    },
    2: {
        **{f"save {key}": (work.save, key, "fsdp", *SAVED[key]) for key in SAVED},
        **{f"traffic {layout}": (work.traffic, layout) for layout in ("ddp", "fsdp")},
        "swapped": (work.run_swapped,),
        "gradients": (work.gradients_of, work.untouched),
        "gradients by a loop": (work.gradients_of, work.with_token_layer),
        "evaluated": (work.written_after_evaluation,),
        "not finite": (work.not_finite_on_one_rank,),
        "refusals": (work.refusals,),
    },
    3: {
        "resume fsdp": (work.resume, "lora", "fsdp", *SAVED["lora"]),
        "resume ddp": (work.resume, "plain", "ddp", *SAVED["plain"]),
    },
    4: {
        "save hsdp": (work.save, "replicated", "hsdp", *REPLICATED),
        "resume hsdp": (work.resume, "replicated", "hsdp", *REPLICATED),
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(ranks)[task]: what each rank has returned; every set of processes is started once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def placed(task):
        folders = (*SAVED, "replicated")
        return tuple(folder / x if isinstance(x, str) and x in folders else x for x in task)

    @cache
    def of(ranks):
        if ranks != 2:
            of(2)  # it saves the checkpoints
        runs = {str(case): (work.run, *case) for case in CASES.get(ranks, [])}
        if ranks == 0:
            runs = {str(kind): (work.run, "one", *kind) for kind in KINDS}
        tasks = {**runs, **{name: placed(task) for name, task in TASKS[ranks].items()}}
        found = run_ranks(ranks, work.in_turn, list(tasks.values()))
        return dict(zip(tasks, zip(*found, strict=True), strict=True))

    return of


def assert_same_run(found, expected, tolerance):
    """All ranks hold the same bits, and they are those of one process up to rounding."""
    for mine in found:
        assert all(map(torch.equal, mine["params"], found[0]["params"]))
        assert mine["losses"] == found[0]["losses"]
    # Llama computes norms and softmax in float32, also in a float64 model.
    for one, other in zip(found[0]["params"], expected["params"], strict=True):
        assert (one - other).abs().max() < tolerance
    assert len(expected["losses"]) == 4  # the first look and three refreshes
    losses, wanted = (torch.tensor(x["losses"]) for x in (found[0], expected))
    assert (losses - wanted).abs().max() < 10 * tolerance


@pytest.mark.parametrize(("ranks", "case"), [(n, case) for n in CASES for case in CASES[n]])
def test_any_layout_trains_what_one_process_trains(results, ranks, case):
    found, (expected,) = results(ranks)[str(case)], results(0)[str(case[1:])]
    assert_same_run(found, expected, 1e-5 if case[2] == FLOAT32 else 1e-6)
    parts = [mine["bytes"] for mine in found]
    if case[0] == "ddp":
        assert parts == [expected["bytes"]] * ranks
    else:  # of U, each rank holds what it holds of the parameters
        replicas = 2 if case[0] == "hsdp" else 1
        assert sum(parts) == replicas * expected["bytes"]
        assert max(parts) < expected["bytes"]
    assert all(mine["looped"] == 0 for mine in found)


def test_parts_are_uneven_and_some_are_empty(results):
    """16 rows on three ranks are 6 + 6 + 4; a LoRA factor's two rows are 1 + 1 + 0."""
    sizes = [mine["parts"] for mine in results(3)[str(CASES[3][1])]]
    assert {tuple(parts) for parts in zip(*sizes, strict=True)} >= {(1, 1, 0), (6, 6, 4)}


def test_safety_examples_are_split_over_the_ranks(results):
    """DDP: all of them; sharded: those whose loss alone is needed."""
    (expected,) = results(0)[str(CASES[2][0][1:])]
    ddp, _, _, fsdp, *_ = (results(2)[str(case)] for case in CASES[2])
    for kind in ("forward_tokens", "backward_tokens"):
        # Lengths differ, and an odd number of examples is made even.
        assert max(mine["passes"][kind] for mine in ddp) < 0.65 * expected["passes"][kind]
    for mine in fsdp:
        assert mine["passes"]["backward_tokens"] == expected["passes"]["backward_tokens"]
        assert mine["passes"]["forward_tokens"] < expected["passes"]["forward_tokens"]


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_step_sends_two_k_numbers_and_one(results, layout):
    """The trace of the task's curvature, then coordinates of parameters and gradients.

    A refresh adds as many as its small matrices have; parts of gradients stay where they are.
    """
    flag = [("allreduce", 4)] if layout == "fsdp" else []
    for mine in results(2)[f"traffic {layout}"]:
        assert [step["examples"] > 0 for step in mine["steps"]].count(True) == 2
        for step in mine["steps"]:
            k, after, q = step["k"], step["after"], step["examples"]
            always = [*flag, *(("allreduce", 8 * n) for n in (1, 2 * k))]
            assert step["calls"][: len(always)] == always
            more = step["calls"][len(always) :]
            if not q:
                assert more == []
                continue
            small = sum(size for name, size in more if name == "allreduce")
            assert small <= 8 * (q * (k + q + after) + after * (after + k) + k + 2 * after + 1)
            names = {name for name, _ in more}
            if layout == "fsdp":  # and the weights, as in any pass of the model
                assert names == {"allreduce", "allgather_base"}
            else:
                rows = sum(size for name, size in more if name == "allgather")
                assert rows == 8 * -(-q // 2) * (mine["numbers"] + 1)


def test_the_optimizer_may_be_made_before_the_model_is_sharded(results):
    (expected,) = results(0)[str(CASES[2][3][1:])]
    assert_same_run(results(2)["swapped"], expected, 1e-6)


@pytest.mark.parametrize(
    ("ranks", "task", "key"),
    [
        (1, "resume fsdp", "plain"),
        (3, "resume ddp", "plain"),
        (0, "whole plain", "plain"),
        (1, "resume one", "lora"),
        (3, "resume fsdp", "lora"),
        (0, "whole lora", "lora"),
    ],
)
def test_a_checkpoint_of_two_ranks_resumes_elsewhere(results, ranks, task, key):
    name, _, options = SAVED[key]
    (expected,) = results(0)[str((name, options))]
    assert_same_run(results(ranks)[task], expected, 1e-6)


def test_a_replicated_and_sharded_run_resumes_as_it_went_on(results):
    (expected,) = results(0)[str((REPLICATED[0], REPLICATED[2]))]
    assert_same_run(results(4)["resume hsdp"], expected, 1e-6)


@pytest.mark.parametrize(("task", "looped"), [("gradients", 0), ("gradients by a loop", 3)])
def test_gradients_of_a_sharded_model(results, task, looped):
    for mine in results(2)[task]:
        assert mine["gap"] < 1e-12
        assert mine["looped"] == looped
        assert mine["same"], "the task's gradients have changed"
        assert mine["owned"], "whole weights were left in place"


def test_passes_see_what_was_written_to_the_parts(results):
    for moved, gap in results(2)["evaluated"]:
        assert moved > 1e-2
        assert gap < 1e-6


def test_an_overflow_on_one_rank_stops_all(results):
    for message, unchanged in results(2)["not finite"]:
        assert message.startswith("FloatingPointError: the task gradient is not finite")
        assert unchanged


def test_an_error_of_one_rank_does_not_wait_for_the_others():
    """Its own copies take its parameters back, and with masters the weights made of them."""
    failed, well = run_ranks(2, work.failed_on_one_rank)
    assert well == ("nothing", False)
    assert failed == ("RuntimeError: in the middle", True)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        *(
            (basis, f'ValueError: basis="{basis}": sharded parameters')
            for basis in ("int8", "factored", "compressed")
        ),
        ("partly", "TypeError: params: 9 of 21 protected parameters are sharded and the others"),
        ("fsdp1", "TypeError: model: FullyShardedDataParallel (FSDP1) flattens parameters"),
        ("fsdp1 later", "TypeError: params: FullyShardedDataParallel (FSDP1) flattens parameters"),
        ("factored gradients", "TypeError: factored gradients: it needs whole parameters"),
        ("tensor parallel", "TypeError: params: a protected parameter has the placements"),
    ],
)
def test_other_layouts_are_refused(results, case, message):
    for mine in results(2)["refusals"]:
        assert mine[case].startswith(message)


def test_one_process_has_nothing_to_exchange():
    values = torch.arange(3.0)
    assert ALONE.sum(values) is values
    assert ALONE.gather(values, 3) is values
    assert ALONE.share(3) == [0, 1, 2]
    assert Layout.of([values]).any(True, values.device)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_shares_put_together_are_everything_once(ranks):
    for count in range(10):
        shares = []
        for rank in range(ranks):
            layout = Layout([])
            layout._size, layout._rank = ranks, rank
            shares.append(layout.share(count))
        assert len(set(map(len, shares))) == 1, "passes of sharded models are run together"
        assert [i for share in shares for i in share][:count] == list(range(count))
        assert all(i < count for share in shares for i in share)


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_are_cut_as_torch_cuts_them(dim):
    for ranks in (1, 2, 3, 4):
        for size in (1, 2, 5, 8):
            shape = (size, 3) if dim == 0 else (3, size)
            whole = torch.arange(2.0 * 3 * size).view(2, *shape)  # of two examples
            chunks = list(whole.chunk(ranks, 1 + dim))
            found = []
            for rank in range(ranks):
                mesh = SimpleNamespace(
                    size=lambda _, n=ranks: n, get_local_rank=lambda _, r=rank: r
                )
                p = SimpleNamespace(
                    device_mesh=mesh, placements=(Shard(dim),), shape=torch.Size(shape)
                )
                part = _part(p, mesh)
                mine = part.cut(whole, leading=1)
                assert part.whole(mine.shape, leading=1) == whole.shape
                if mine.numel():
                    found.append(mine)
            assert all(map(torch.equal, found, chunks))
            assert len(found) == len(chunks)
