"""What `import safeopt` needs: torch and numpy, as pyproject.toml promises."""

import subprocess
import sys

import pytest

# Everything that only an extra brings.
OPTIONAL = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "peft",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "transformers",
    "trl",
    "typer",
    "yaml",
}

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)
sys.meta_path.insert(0, Blocker())
import {module}
"""


@pytest.mark.parametrize("module", ["safeopt", "safeopt.data", "safeopt.curvature.krylov"])
def test_the_core_imports_with_torch_and_numpy_alone(module):
    code = BLOCKED.format(blocked=OPTIONAL, module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
