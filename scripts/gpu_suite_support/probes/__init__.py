"""Programs that the suite runs as child processes. Each prints one JSON object as its last line."""
