"""The curvature benchmark on the tiny model: every part, the peers, resuming and the report."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import tiny
from benchmarks.__main__ import app
from benchmarks.config import ConfigError
from benchmarks.curvature import peers
from benchmarks.curvature import run as runner
from benchmarks.curvature.eigenpairs import LOSS, max_residual, operator_of, ours
from benchmarks.curvature.memory import measure_memory
from benchmarks.curvature.peers import PEERS, PeerMissingError, Problem, Solved, run_peer
from benchmarks.curvature.problem import SMALL, Bench, Scored, adamw_steps, scored_targets
from benchmarks.curvature.records import Row, read
from benchmarks.curvature.report import report
from safeopt.curvature.operators.objective import Objective

QUIET = Console(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def short_training():
    """Refusals need not be perfect here; `memory` has its own processes and its own test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "STEPS", 60)
        sizes = {
            name: {"peak_bytes": size, "steps": 1, "basis": None}
            for name, size in (("adamw", 100), ("projected_adamw", 120))
        }
        patch.setattr(runner, "measure_memory", lambda setting: {**sizes, "ratio": 1.2})
        tiny._kept_state.cache_clear()
        yield
    tiny._kept_state.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("curvature")
    done = CliRunner().invoke(app, ["curvature", "--tiny", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def problem():
    bench = Bench(SMALL)
    with bench.wide() as (model, params):
        adamw_steps(model, params, bench.task_batches(2), 1e-3)
        yield Problem(model, params, bench.safety_batch(3), 2, 1e-3)


def test_result_has_the_form_that_was_asked_for(folder):
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == {"eigenpairs", "gram", "basis", "aic"}
    keys = {"implementation", "operator", "start", "seconds", "products", "max_residual"}
    assert all(set(row) == keys | {"peak_bytes"} for row in result["eigenpairs"])
    assert {row["start"] for row in result["eigenpairs"]} == {"cold", "warm"}
    assert set(result["gram"]) == {
        "one_pass_seconds",
        "loop_seconds",
        "forward_backward_seconds",
    }
    assert [row["kind"] for row in result["basis"]] == [
        "dense",
        "int8",
        "factored",
        "compressed",
    ]
    assert set(result["basis"][0]) == {"kind", "nbytes", "dense_fp32_nbytes", "projection_error"}
    assert all(set(row) == {"implementation", "seconds", "parameters"} for row in result["aic"])


def test_every_implementation_ran_and_only_pyhessian_misses_the_tolerance(folder):
    result, details = read(folder)
    ran = {(row.implementation, row.operator) for row in result.eigenpairs}
    wanted = {(peer.name, kind) for peer in PEERS for kind in peer.operators}
    assert ran == wanted | {("safeopt", "hessian"), ("safeopt", "ggn")}
    assert details.skipped == {"ggn-pyhessian": "pyhessian has no ggn operator"}
    for row in result.eigenpairs:
        assert row.products >= SMALL.rank
        # Its own criterion is the change of an eigenvalue, which is not the residual.
        assert row.max_residual < (1 if row.implementation == "pyhessian" else 3 * SMALL.tolerance)


def test_implementations_agree_on_the_eigenvalues(folder):
    _, details = read(folder)
    for kind in ("hessian", "ggn"):
        expected = details.parts[f"{kind}-safeopt-cold"]["eigenvalues"]
        for name, part in details.parts.items():
            if name.startswith(kind) and "pyhessian" not in name:  # it stops long before that
                assert part["eigenvalues"] == pytest.approx(expected, rel=1e-3)


def test_aic_figures_are_those_of_the_peer(folder):
    _, details = read(folder)
    for key in ("overlap", "epsilon", "gamma", "eigenvalues"):
        mine, other = (details.parts[f"aic-{name}"][key] for name in ("safeopt", "alignment-risk"))
        assert mine == pytest.approx(other, rel=1e-3)


def test_storages_project_as_they_promise(folder):
    result, _ = read(folder)
    error = {row.kind: row.projection_error for row in result.basis}
    assert error["dense"] < 1e-4
    assert error["factored"] < 1e-4
    assert error["int8"] < 1e-2
    assert error["compressed"] < 0.5  # matrices as small as these compress badly


def test_a_finished_part_is_not_run_again(folder, monkeypatch):
    class Unused:
        def __init__(self, setting):
            raise AssertionError("nothing is left to do")

    monkeypatch.setattr(runner, "Bench", Unused)
    before = (folder / "result.json").read_text()
    runner.run(SMALL, folder, QUIET)
    assert (folder / "result.json").read_text() == before


def test_parts_of_another_commit_are_told_apart(folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folder, out)
    assert "Not all parts are of one commit" not in report(out, QUIET).read_text()
    path = out / "parts" / "gram.json"
    part = json.loads(path.read_text())
    part["origin"]["commit"] = "earlier"
    path.write_text(json.dumps(part))
    runner.run(SMALL, out, QUIET)
    origins = read(out)[1].origins
    assert origins["gram"].commit == "earlier"
    assert len({origin.commit for origin in origins.values()}) == 2
    assert "Not all parts are of one commit" in report(out, QUIET).read_text()


def test_parts_of_another_setting_are_refused(folder):
    other = type(SMALL)(**{**SMALL.as_json(), "rank": 2})
    with pytest.raises(ConfigError, match="holds parts of another setting"):
        runner.run(other, folder, QUIET)


def test_report_has_a_row_for_each_measurement(folder):
    page = report(folder, QUIET).read_text()
    result, _ = read(folder)
    rows = len(result.eigenpairs) + len(result.basis) + len(result.aic)
    assert page.count("\n| ") == rows + 4 + 2 + 5  # the Gram timings, two optimizers, five heads
    assert (folder / "eigenpairs.png").stat().st_size > 5000
    assert (folder / "storage.png").stat().st_size > 5000


def test_report_without_a_result(tmp_path):
    with pytest.raises(ConfigError, match="no finished result of the curvature benchmark"):
        report(tmp_path, QUIET)


def test_peers_see_the_loss_of_our_operators(problem):
    theirs = torch.nn.CrossEntropyLoss()(
        Scored(problem.model)(problem.batch), scored_targets(problem.batch)
    )
    objective = Objective(LOSS)
    losses = objective.losses(problem.model, problem.batch)
    total = losses.sum() / objective.weight(problem.batch, losses)
    torch.testing.assert_close(theirs, total)


def test_referee_sees_a_wrong_eigenvector(problem):
    found = ours(problem, "ggn")
    assert max_residual(problem, "ggn", found) < 2 * problem.tolerance
    wrong = Solved(found.values, found.rows.flip(0), found.products)
    assert max_residual(problem, "ggn", wrong) > 0.1


def test_a_missing_peer_is_named_with_the_cure(problem):
    absent = peers.Peer("nobody", "nobody-knows", "nobody_knows", ("hessian",), peers._pyhessian)
    with pytest.raises(PeerMissingError, match=r"nobody-knows cannot be imported.*oracles\.txt"):
        run_peer(absent, problem, "hessian")


def test_peers_leave_the_model_as_it_was(problem):
    before = [p.detach().clone() for p in problem.params]
    forward = {type(m).__name__: m.forward.__func__ for m in problem.model.modules()}
    for peer in PEERS:
        run_peer(peer, problem, "hessian")
    assert all(torch.equal(a, b) for a, b in zip(before, problem.params, strict=True))
    assert all(p.grad is None for p in problem.params)
    after = {type(m).__name__: m.forward.__func__ for m in problem.model.modules()}
    assert after == forward


def test_operator_is_over_the_adapters(problem):
    assert operator_of(problem, "hessian").size == sum(p.numel() for p in problem.params)


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own():
    found = measure_memory(SMALL)
    assert found["projected_adamw"]["basis"]["directions"] > 0
    assert found["ratio"] == pytest.approx(
        found["projected_adamw"]["peak_bytes"] / found["adamw"]["peak_bytes"]
    )
    assert found["adamw"]["peak_bytes"] > 50_000_000


def test_records_refuse_unknown_names():
    with pytest.raises(ValueError, match="Extra inputs"):
        Row.model_validate({"surprise": 1})
