"""Makes points on a spiral with three arms, trains on some, and leaves others for the job."""

from pathlib import Path

import numpy as np
import pandas as pd
import tensorflow as tf

LABELS = np.array(["red", "green", "blue"])


def make_points(count, seed):
    random = np.random.default_rng(seed)
    arm = random.integers(len(LABELS), size=count)
    radius = random.uniform(0.1, 1, size=count)
    angle = 4 * radius + arm * 2 * np.pi / 3 + random.normal(scale=0.15, size=count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype("float32"), arm


tf.keras.utils.set_random_seed(0)
model = tf.keras.Sequential(
    [
        tf.keras.Input((2,), name="point"),
        tf.keras.layers.Dense(64, activation="relu"),
        tf.keras.layers.Dense(64, activation="relu"),
        tf.keras.layers.Dense(len(LABELS), activation="softmax"),
    ]
)
model.compile(tf.keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy")
model.fit(*make_points(6_000, seed=1), epochs=20, batch_size=128, verbose=0)
model.export("models/spirals/1", verbose=False)  # version 1; the highest is the latest

points, arm = make_points(20_000, seed=2)
frame = pd.DataFrame({"id": range(len(points)), "x": points[:, 0], "y": points[:, 1], "target": LABELS[arm]})
Path("data").mkdir(exist_ok=True)
for number in range(4):
    frame.iloc[number::4].to_parquet(f"data/{number}.parquet", index=False)
