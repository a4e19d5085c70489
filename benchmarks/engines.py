"""The engines that are compared, and the virtual environments of those that are not part of this project.

An engine is a script beside this one with the command line of ``workloads.run_of``. To add a peer, write its script as
its own documentation advises and list it here with what it needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENGINES", "Engine"]

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine: its script, and its packages when it has an environment of its own."""

    name: str
    title: str
    script: str
    #: What pip installs into the engine's own environment; none: the project's environment is used.
    packages: tuple[str, ...] = ()
    #: Whose versions are reported.
    versions: tuple[str, ...] = ("numpy", "pyarrow")

    @property
    def is_peer(self) -> bool:
        """Whether it is neither ours nor the floor."""
        return self.name not in ("floor", "ours")

    def python(self, folder: Path) -> str:
        """Return the interpreter to run with; makes the engine's environment the first time.

        Raises
        ------
        subprocess.CalledProcessError
            If the packages do not install here.
        """
        if not self.packages:
            return sys.executable
        home = folder / self.name
        python = home / "bin" / "python"
        if not (home / ".installed").exists():
            print(f"making the environment of {self.title} in {home}", file=sys.stderr)
            venv.create(home, with_pip=True, clear=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.packages]
            subprocess.run(install, check=True, capture_output=True, text=True)
            subprocess.run([str(python), "-m", "compileall", "-q", "-j", "0", str(home / "lib")], capture_output=True)
            (home / ".installed").touch()
        return str(python)

    def installed(self, python: str) -> dict[str, str]:
        """Return the versions that this engine runs with."""
        program = (
            "import importlib.metadata as m, json, platform, sys; "
            "print(json.dumps({'python': platform.python_version(), **{n: m.version(n) for n in sys.argv[1:]}}))"
        )
        done = subprocess.run([python, "-c", program, *self.versions], check=True, capture_output=True, text=True)
        versions: dict[str, str] = json.loads(done.stdout)
        return versions

    def command(self, python: str) -> list[str]:
        """Return the start of the command line."""
        return [python, str(HERE / self.script)]


#: What the workloads themselves import.
MODEL = ("numpy", "joblib", "scikit-learn")

#: In the order of the table; the first is what the others are measured against.
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("floor", "floor (plain processes)", "floor.py"),
        Engine("ours", "cortex_dask", "ours.py", versions=("cortex-dask", "distributed", "numpy", "pandas", "pyarrow")),
        Engine("dask_client", "Dask client.map", "dask_client.py", versions=("distributed", "numpy", "pyarrow")),
        Engine("dask_dataframe", "dask.dataframe", "dask_dataframe.py", versions=("dask", "pandas", "pyarrow")),
        Engine("daft", "Daft", "daft_class.py", ("daft", *MODEL), ("daft", "numpy", "pyarrow")),
        Engine("ray_data", "Ray Data", "ray_data.py", ("ray[data]", *MODEL), ("ray", "numpy", "pyarrow")),
        Engine(
            "spark",
            "Spark",
            "spark_arrow.py",
            ("pyspark", "pandas<3", "pyarrow", *MODEL),
            ("pyspark", "numpy", "pyarrow"),
        ),
    )
}
