"""What is a data owner's own: the policy it keeps, what leaves its machine, and the ledger of what did."""
