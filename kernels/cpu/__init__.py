"""CPU kernels: so far what torch itself has for int4 and int8."""
