"""irlfast inside other trainers: one module or package for each of them, none of which it depends on."""
