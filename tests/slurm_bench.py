"""What a person does with sweeps on the cluster of the tests, and what is looked at afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rerail.sweep.folder import Sweep, sweeps_of

# what a second run of a cell may differ in
VOLATILE = ("host", "time", "seconds", "evaluation_seconds", "peak_memory", "revision", "choices")


class Done(NamedTuple):
    code: int
    said: str


class Bench:
    """The commands of a person who works in `home`, with the cluster in reach."""

    def __init__(self, cluster, home: Path, model: Path):
        self.cluster, self.home, self.model = cluster, home, model
        self.env = {**cluster.env, "RERAIL_CACHE": str(model / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        # as after `make slurm-up`: the profile finds the cluster by its folder
        del self.env["SLURM_CONF"]
        self.env["PATH"] = os.environ["PATH"]

    def words(self, *more: str) -> list[str]:
        text = f"[{self.model / 'text.jsonl'}]"
        return [
            *("model=local", f"model.path_or_id={self.model}", "calibration=files"),
            *(f"calibration.sources.0.paths={text}", "evaluation=file", "samples.count=32"),
            *(f"evaluation.texts.file.sources.0.paths={text}", "evaluation.texts.file.samples=4"),
            *("calibration.block=16", "evaluation.texts.file.block=16", "evaluation.new_tokens=2"),
            *("distill.batch_size=4", "distill.epochs=120", "distill.evaluations=4", "trainer=cpu"),
            *("trainer.enable_progress_bar=false", *more),
        ]

    def start(self, *words: str, out: str = "out") -> "subprocess.Popen[str]":
        # a person's terminal ignores no interrupt, whatever started the tests (nohup and `&` do)
        command = ["env", "--default-signal=INT", sys.executable]
        command += ["-m", "rerail", "-m", "+slurm=local", f"out={out}", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.home, env=self.env, **pipes)

    def rerail(self, *words: str, out: str = "out") -> Done:
        return self.ended(self.start(*words, out=out))

    def ended(self, child: "subprocess.Popen[str]") -> Done:
        said, _ = child.communicate(timeout=170)
        return Done(child.returncode, said)

    def submit(self, **sweeps: list[str]) -> None:
        """Submit sweeps side by side, each below its own folder."""
        children = [
            self.start(*words, "hydra.launcher.wait=false", out=out)
            for out, words in sweeps.items()
        ]
        for done in [self.ended(child) for child in children]:
            assert done.code == 0, done.said

    def sweep(self, *words: str) -> Done:
        command = [sys.executable, "-m", "rerail.cli.sweep", *words]
        done = subprocess.run(
            command, cwd=self.home, env=self.env, capture_output=True, text=True, check=False
        )
        return Done(done.returncode, done.stdout + done.stderr)

    def sweeps(self, out: str = "out") -> list[Sweep]:
        notes: list[str] = []
        found = list(sweeps_of(self.home / out, notes))
        assert not notes
        return found

    def folders(self, out: str = "out") -> list[Path]:
        return sorted(p.parent for p in (self.home / out).glob("*/status.json"))

    def status(self, folder: Path) -> dict:
        return json.loads((folder / "status.json").read_text())

    def jobs(self, out: str = "out") -> list[dict[str, str]]:
        files = sorted((self.home / out / "sweeps").glob("*/jobs.json"))
        return [json.loads(file.read_text()) for file in files]

    def logs(self, job: str, out: str = "out") -> list[str]:
        """Return what each task of a job wrote to its standard error."""
        files = sorted((self.home / out / "sweeps").glob(f"*/jobs/{job}_*_log.err"))
        return [file.read_text() for file in files]

    def done(self, out: str = "out") -> list[Path]:
        return [folder for folder in self.folders(out) if self.status(folder)["state"] == "done"]

    def node(self, job: str) -> str:
        return self.cluster.run("squeue", "-h", "-j", job, "-o", "%N")

    def wait_for_fit(self, before: int = 0, out: str = "out") -> tuple[Path, dict]:
        """Wait until a cell is repaired by another process than `before`; folder and status."""
        found: list[tuple[Path, dict]] = []

        def fits() -> bool:
            said = [(folder, self.status(folder)) for folder in self.folders(out)]
            found[:] = [
                (folder, held)
                for folder, held in said
                if (held["state"], held["stage"]) == ("running", "repair")
                and held["pid"] != before
                and (before or held["progress"])  # the first time some steps are made
            ]
            return bool(found)

        self.cluster.wait_for(fits, 120, "a cell in its repair")
        return found[0]

    def wait_until_over(self, out: str = "out") -> Done:
        return self.sweep("status", out, "--watch", "--exit-code")


def rows(folder: Path) -> list[dict]:
    held = json.loads((folder / "result.json").read_text())
    return [{n: v for n, v in row.items() if n not in VOLATILE} for row in held]
