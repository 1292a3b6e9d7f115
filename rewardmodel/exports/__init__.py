"""A trained run -> an adapter, a merged model or a Kaggle bundle, checked against the run."""
