"""Predictions -> metrics, calibration, bias audits, reports. Never imports torch."""
