"""One pass per file. Each says what it needs, what it leaves true, and whether it changed anything."""
