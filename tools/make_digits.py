"""Make the data and the model of the project template from scikit-learn's digits.

    python tools/make_digits.py            # writes cortex_dask/template/data/*.parquet and model.npz

The same versions of scikit-learn, NumPy and pyarrow write the same bytes. scikit-learn is needed here only: the
template's handler needs NumPy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

TEMPLATE = Path(__file__).resolve().parent.parent / "cortex_dask" / "template"
FILES = 8
PIXELS = 64


def make_data(folder: Path, pixels: np.ndarray, target: np.ndarray) -> None:
    """Write the images as Parquet files of about equal size."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.parquet"):
        old.unlink()
    for number, rows in enumerate(np.array_split(np.arange(len(target)), FILES)):
        values = pa.array(pixels[rows].astype(np.uint8).ravel())
        table = pa.table(
            {
                "id": pa.array(rows, pa.int64()),
                "pixels": pa.FixedSizeListArray.from_arrays(values, PIXELS),
                "target": pa.array(target[rows], pa.int8()),
            }
        )
        pq.write_table(table, folder / f"digits-{number}.parquet", compression="zstd")


def make_model(file: Path, pixels: np.ndarray, target: np.ndarray) -> float:
    """Train on the even rows, write the weights, and return the accuracy on the odd ones."""
    even = np.arange(len(target)) % 2 == 0
    model = LogisticRegression(C=0.01, max_iter=5_000).fit(pixels[even], target[even])
    np.savez(file, weights=model.coef_.T.astype(np.float32), bias=model.intercept_.astype(np.float32))
    return float(model.score(pixels[~even], target[~even]))


def main() -> None:
    """Run as a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=TEMPLATE, help="the project to write to")
    folder = parser.parse_args().folder
    digits = load_digits()
    make_data(folder / "data", digits.data, digits.target)
    accuracy = make_model(folder / "model.npz", digits.data, digits.target)
    print(f"{len(digits.target):,} images; accuracy on unseen ones: {accuracy:.1%}")


if __name__ == "__main__":
    main()
