"""What every step program needs: errors, files, digests, command lines, run records, seeds, logging."""
