"""Tells benign from malignant tumors with a random forest."""

import joblib


class Handler:
    def __init__(self, config):
        self.model = joblib.load(config["model"])
        self.features = list(self.model.feature_names_in_)

    def handle_batch(self, payload):
        probability = self.model.predict_proba(payload[self.features])[:, 1]
        result = payload[["id"]].copy()
        result["prediction"] = (probability >= 0.5).astype("int64")
        result["probability"] = probability
        return result
