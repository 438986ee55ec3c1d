SELECT
    order AS transaction_id,
    buyer AS customer_id,
    sku AS product_id,
    qty AS quantity,
    total AS amount,
    at AS timestamp,
    paid_by AS payment_method,
    CASE state WHEN 'shipped' THEN 'completed' WHEN 'returned' THEN 'refunded' WHEN 'open' THEN 'pending' ELSE state END
        AS status,
    voucher,
    _delivery, _source_file, _source_row
FROM transactions
