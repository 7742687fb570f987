"""Losses and the estimators that feed them: pure tensor functions, unreduced, checked on entry."""
