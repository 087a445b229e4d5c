"""The folders that a run writes, and whether the files of its checkpoints are whole."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from safeopt.finetuning.folders import RESULT

# Without one of these Trainer would go on, but not from where the run stood.
_NEEDED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def checkpoints(out: Path) -> list[Path]:
    """The folders of a run's checkpoints, the oldest first."""
    found = {
        int(number): folder
        for folder in out.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal()
        and folder.is_dir()
    }
    return [found[number] for number in sorted(found)]


def written_folders(out: Path) -> list[Path]:
    """The folders that a run in ``out`` writes, or that starting it again removes.

    A run's result need not be there; of the checkpoints only those are named that are.
    """
    return [*checkpoints(out), *(out / name for name in RESULT.values())]


def last_checkpoint(out: Path) -> Path:
    """The checkpoint from which a run is resumed.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if one of its files is missing or was cut off, saying which checkpoint is whole.
    """
    found = checkpoints(out)
    if not found:
        raise FileNotFoundError(
            f"resume: there is no checkpoint in {out}; start it with --overwrite"
        )
    *earlier, last = found
    damage = _damage(last)
    if damage is None:
        return last
    whole = next((folder for folder in reversed(earlier) if _damage(folder) is None), None)
    if whole is None:
        cure = "no earlier checkpoint is whole; start again with --overwrite"
    else:
        after = found[found.index(whole) + 1 :]
        cure = f"remove {', '.join(map(str, after))} to continue from {whole.name}"
    raise ValueError(f"resume: {damage}; {cure}")


def _damage(checkpoint: Path) -> str | None:
    """The first file that is not as it was written, and what is wrong with it."""
    weights = set(checkpoint.glob("*.safetensors"))
    if (index := checkpoint / SAFE_WEIGHTS_INDEX_NAME).is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            weights |= {checkpoint / name for name in shards}
        except (ValueError, KeyError, AttributeError) as error:
            return f"{index} was cut off or is damaged ({error})"
    for path in (*(checkpoint / name for name in _NEEDED), *sorted(weights)):
        if not path.is_file():
            return f"{path} is missing"
        try:
            _open(path)
        except (ValueError, OSError, zipfile.BadZipFile, SafetensorError) as error:
            return f"{path} was cut off or is damaged ({error})"
    return None if weights else f"{checkpoint} holds no weights (*.safetensors)"


def _open(path: Path) -> None:
    """Look at where a file says what it holds: its end or its beginning, not all of it."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    else:
        with zipfile.ZipFile(path):
            pass
