"""What answers visitors and programs: the run that is served, FLUX's lane, request schemas, endpoints."""
