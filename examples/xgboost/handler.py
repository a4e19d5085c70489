"""Predicts how many bicycles are rented in an hour."""

import pyarrow as pa
import xgboost


class Handler:
    def __init__(self, config):
        self.model = xgboost.Booster(model_file=config["model"])

    def handle_batch(self, payload):
        rentals = self.model.predict(xgboost.DMatrix(payload[self.model.feature_names]))
        return pa.table({"id": payload["id"].to_numpy(), "prediction": rentals.clip(min=0)})
