POLICIES = ("first", "always", "never")
