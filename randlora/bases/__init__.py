"""The random bases that layers share: how they are drawn, stored, packed, copied and recognised again."""
