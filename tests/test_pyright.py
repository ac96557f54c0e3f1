"""The types as pyright sees them, in strict mode, in an environment that has the wheel and no checkout."""

import json
import shutil
from pathlib import Path

from tests import pyright
from tests.wheel import Environment


def test_a_strict_program_passes(installed: Environment, tmp_path: Path) -> None:
    """The program that uses the public face has no error and no warning."""
    command = pyright.command()
    shutil.copy(pyright.ROOT / "tests" / "typed_program.py", tmp_path)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "include": ["typed_program.py"]})
    )
    done = installed.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "0 errors, 0 warnings" in done.stdout


def test_every_public_type_is_known(installed: Environment, tmp_path: Path) -> None:
    """Nobody who imports anything of the package meets a type that is left to a checker to guess."""
    command = pyright.command()
    done = installed.run(*command, "--verifytypes", "saga_store", "--ignoreexternal", cwd=tmp_path)
    unknown = [line for line in done.stdout.splitlines() if " - error: " in line]
    assert unknown == []
    assert "Type completeness score: 100%" in done.stdout
