"""Continual learning: tasks one after another on one base, every task scored after every stage, and what that says."""
