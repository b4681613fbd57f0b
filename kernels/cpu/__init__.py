"""CPU kernels: native ones, built at first use, and what torch itself has for int4 and int8."""
