"""Who says which of two answers is better: a rule, a reward head that was fitted on pairs, or an endpoint."""
