"""Tests named after the sections of the contract with those who wrote batch jobs for Cortex."""
