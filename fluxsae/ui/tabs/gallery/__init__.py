"""The Gallery tab: features that mean something, and their cards."""
