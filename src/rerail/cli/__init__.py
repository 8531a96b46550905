"""The commands: `rerail`, `rerail demo`, `rerail-report`, `rerail-sweep`, `rerail-dashboard`."""
