"""Trains on half of the breast cancer data that scikit-learn ships; the job predicts the other half."""

from pathlib import Path

import joblib
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier

frame = load_breast_cancer(as_frame=True).frame
frame.insert(0, "id", range(len(frame)))
seen, unseen = frame[frame["id"] % 2 == 0], frame[frame["id"] % 2 == 1]

model = RandomForestClassifier(random_state=0)
model.fit(seen.drop(columns=["id", "target"]), seen["target"])
joblib.dump(model, "model.joblib")

Path("data").mkdir(exist_ok=True)
for number in range(4):
    unseen.iloc[number::4].to_parquet(f"data/{number}.parquet", index=False)
