"""The page of `neuroflow app` as a Space of the Hub: its card, its program and what it installs."""
