"""What every tab uses: colours, elements, texts, the shared scripts and styles."""
