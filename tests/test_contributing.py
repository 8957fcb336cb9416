"""The diffs in CONTRIBUTING.md: each applies to the repository, and the code it adds passes the tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIFFS = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
CHECKS = {
    "memstudy/attention/sigmoid.py": [["tests/test_attention.py", "-k", "sigmoid or every_variant"]],
    "memstudy/techniques/optimizers.py": [
        ["tests/test_techniques.py", "tests/test_techniques_of_studies.py", "-k", "lion or every_technique"]
    ],
    "memstudy/trainers/product.py": [["tests/test_product.py"]],
    "memstudy/profiler/gpus.yaml": [["tests/test_gpus.py", "-k", "card"]],
    "notebooks/batch_growth.ipynb": [
        ["tests/test_report.py", "-k", "batch_growth"],
        ["--nbval-lax", "--nbval-current-env", "notebooks/batch_growth.ipynb"],
    ],
}
EVEN_SLOW = "not gpu and not by_hand"


def test_a_variant_a_technique_a_study_a_kind_of_run_and_a_gpu_are_shown():
    assert len(DIFFS) == len(CHECKS)
    assert all(any(f"b/{path}" in diff for diff in DIFFS) for path in CHECKS)


@pytest.mark.parametrize("path", CHECKS)
def test_a_diff_applies(path):
    (diff,) = (diff for diff in DIFFS if f"b/{path}" in diff)
    tried = subprocess.run(["git", "apply", "--check", "-"], input=diff, text=True, cwd=ROOT, capture_output=True)
    assert tried.returncode == 0, tried.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKS)
def test_what_a_diff_adds_passes_its_tests(path, tmp_path):
    (diff,) = (diff for diff in DIFFS if f"b/{path}" in diff)
    for part in ("memstudy", "tests", "notebooks", "params", "report"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "build"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    applied = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, capture_output=True)
    assert applied.returncode == 0, applied.stderr
    for arguments in CHECKS[path]:
        checked = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", EVEN_SLOW, *arguments],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout[-3000:]
        assert re.search(r"\d+ passed", checked.stdout)
