"""Makes hours in which bicycles are rented, trains on some, and leaves others for the job."""

from pathlib import Path

import numpy as np
import pandas as pd
import xgboost


def make_hours(count, seed):
    random = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "hour": random.integers(24, size=count),
            "weekday": random.integers(7, size=count),
            "temperature": random.normal(12, 8, size=count),
            "rain": random.exponential(0.5, size=count) * (random.uniform(size=count) < 0.3),
        }
    )
    commuters = np.exp(-((frame["hour"] - 8) ** 2) / 4) + np.exp(-((frame["hour"] - 17) ** 2) / 6)
    strollers = np.exp(-((frame["hour"] - 14) ** 2) / 20)
    crowd = np.where(frame["weekday"] < 5, 300 * commuters, 250 * strollers) + 20
    weather = 1 / (1 + np.exp(-(frame["temperature"] - 10) / 5)) * np.exp(-frame["rain"])
    frame["target"] = random.poisson(crowd * weather).astype("float64")
    return frame


seen = make_hours(20_000, seed=1)
features = seen.drop(columns="target")
model = xgboost.train(
    {"objective": "count:poisson", "max_depth": 6, "eta": 0.3, "nthread": 2, "seed": 0},
    xgboost.DMatrix(features, seen["target"]),
    num_boost_round=80,
)
model.save_model("model.ubj")

unseen = make_hours(50_000, seed=2)
unseen.insert(0, "id", range(len(unseen)))
Path("data").mkdir(exist_ok=True)
for number in range(5):
    unseen.iloc[number::5].to_parquet(f"data/{number}.parquet", index=False)
