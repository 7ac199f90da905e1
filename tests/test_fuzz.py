"""A little of the fuzz, so that the script cannot rot; `python tests/fuzz.py` is the whole."""

import subprocess
import sys
from pathlib import Path


def test_every_case_ends_in_success_or_in_one_line():
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), "--rows", "15", "--mutations", "25"]
    result = subprocess.run(command, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert "25 mutations" in result.stdout and "0 findings" in result.stdout
