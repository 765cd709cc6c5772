"""The page of a run of FLUX.1-dev's size: how soon it opens, how it answers, what it holds."""
