"""Trains a network on half of the digits that scikit-learn ships, and exports it; the job predicts the other half."""

from pathlib import Path

import numpy as np
import pandas as pd
from skl2onnx import to_onnx
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

pixels, digits = load_digits(return_X_y=True)
pixels = pixels.astype("float32")
number = np.arange(len(pixels))
seen = number % 2 == 0

model = make_pipeline(StandardScaler(), MLPClassifier((64,), max_iter=300, random_state=0))
model.fit(pixels[seen], digits[seen])
# zipmap off: the probabilities are one array instead of a dict for each row
exported = to_onnx(model, pixels[:1], options={"zipmap": False})
Path("model.onnx").write_bytes(exported.SerializeToString())

Path("data").mkdir(exist_ok=True)
rows = pd.DataFrame({"id": number, "pixels": list(pixels), "target": digits})[~seen]
for part in range(4):
    rows.iloc[part::4].to_parquet(f"data/{part}.parquet", index=False)
