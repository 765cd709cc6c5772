"""One folder for each tab of the page."""
