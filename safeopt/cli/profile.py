"""``safeopt profile``: what a finished run of `safeopt finetune` did to the safety curvature."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safeopt.cli.console import console, loading, quiet_libraries, readable_errors, say
from safeopt.finetuning.folders import check_folder


def profile(
    run: Annotated[Path, typer.Option(help="Folder that `safeopt finetune` has written.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the profile; RUN/profile by default.")
    ] = None,
    safety: Annotated[
        Path | None, typer.Option(help="JSON lines with harmful prompts; the run's by default.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Directions of the subspace, at most.")] = 16,
    examples: Annotated[int, typer.Option(help="Safety examples to look at, at most.")] = 32,
    card: Annotated[
        bool, typer.Option(help="Put the profile into the README.md of the adapter or model.")
    ] = True,
) -> None:
    """Compare a fine-tuned model with the aligned one: curvature, alignment loss, overlap."""
    with readable_errors(), quiet_libraries():
        if not run.is_dir():
            what = "it is a file" if run.exists() else "there is no such folder"
            raise FileNotFoundError(f"run={run}: {what}; expected what `safeopt finetune` wrote")
        folder = out or run / "profile"
        check_folder(folder)
        found, result = _profile(run, safety, rank, examples)
        from safeopt.diagnostics.model_card import section, update_card
        from safeopt.diagnostics.profile_plots import profile_plots
        from safeopt.files import write_json, write_whole

        folder.resolve().mkdir(parents=True, exist_ok=True)  # it may be a link to what is not there
        write_json(folder / "profile.json", result)
        write_whole(folder / "profile.md", section(result) + "\n")
        for name, figure in profile_plots(result, found.report).items():
            figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
        loss, overlap = result["alignment_loss"], result["overlap"]
        say(
            f"alignment loss {loss['before']:.4f} before, {loss['after']:.4f} after: nats a token, "
            "of whole refusals"
        )
        say(
            f"{overlap['share']:.2%} of the weights' change lies in the safety subspace (matched "
            f"control {overlap['share_matched']:.2%}, random {overlap['share_random']:.2%})"
        )
        if card:
            update_card(found.folder / "README.md", result)
        say(f"wrote {folder}" + (f" and {found.folder}/README.md" if card else ""))


def _profile(run: Path, safety: Path | None, rank: int, examples: int) -> tuple[Any, Any]:
    with loading("loading the model before and after, and its safety prompts"):
        from safeopt.diagnostics.profile import curvature_profile
        from safeopt.finetuning.finished import load_finished

        found = load_finished(run, safety, examples)
    with console.status("two passes over the safety examples"):
        return found, curvature_profile(found.change, found.batches, found.report, rank=rank)
