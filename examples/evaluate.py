"""Says how right the predictions of an example are: python evaluate.py FOLDER."""

import json
import sys
from pathlib import Path

import pandas as pd


def evaluate(folder):
    """Compare what a job wrote with what is true; each row stands in both once."""
    truth = pd.read_parquet(Path(folder, "data"))
    found = pd.read_parquet(Path(folder, "predictions"))
    both = truth[["id", "target"]].merge(found[["id", "prediction"]], on="id")
    if both["target"].dtype.kind == "f":
        score = (
            1
            - ((both["target"] - both["prediction"]) ** 2).sum() / ((both["target"] - both["target"].mean()) ** 2).sum()
        )
        measure = "r2"
    else:
        score = (both["target"] == both["prediction"]).mean()
        measure = "accuracy"
    return {
        "rows": len(truth),
        "predicted": len(found),
        "once": sorted(found["id"]) == sorted(truth["id"]),
        measure: round(float(score), 4),
    }


if __name__ == "__main__":
    print(json.dumps(evaluate(sys.argv[1])))
