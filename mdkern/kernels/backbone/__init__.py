"""The backbone's operators: products, rotary embedding, norms."""
