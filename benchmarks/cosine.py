"""The plainest rival on pairs of sentences: the cosine of two vectors, nothing trained.

    python -m benchmarks.cosine --data-dir STS-B

STS-B's test pairs as in docs/quality.md (1,000 of them, drawn alike for every seed), by
the encoder of the extra `demo`, whose vectors are the mean of their tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks._common import RESULTS
from bidora.methods import make_method
from bidora.models import find_model
from bidora.pooling import CONTRASTS
from bidora.probing import extract
from bidora.runs.examples import read_examples
from bidora.runs.prepared import prepare
from bidora.runs.results import Listener, environment
from bidora.runs.settings import TrainSettings

OUT = RESULTS / "cosine.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    settings = TrainSettings(
        task="glue/stsb",
        data_dir=given.data_dir,
        method="probe",
        max_train_samples=500,
        max_validation_samples=400,
        max_test_samples=1000,
        pairs="apart",
    )
    examples = read_examples(settings, Listener(), searches=False)
    method, device = make_method("probe"), torch.device("cpu")
    job = prepare(settings, method, find_model(), examples, device, Listener())
    scores = {}
    for part in ("validation", "test"):
        features, _ = extract(job.model, job.sets[part], job.collate)
        width = features.values.shape[1] // CONTRASTS
        cosines = features.values[:, :width].mean(
            axis=1
        )  # see `bidora.pooling.contrast`
        found = job.examples.task.metrics(
            cosines[:, None], features.targets, job.examples.schema
        )
        # A cosine is no number of the labels' scale, so its error has no meaning.
        scores[part] = {name: found[name] for name in ("pearson", "spearman")}
    result = {"environment": environment("cpu"), "scores": scores}
    given.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
