"""What programs are told: flags and --help, without what takes seconds to import. Packages have a flags.py of their own."""
