"""Files, hub data sets and tables -> battles: read, parse, group, split, audit."""
