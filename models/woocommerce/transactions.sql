-- WooCommerce: one row per order item, and one row for each refund.
--
-- Export: the extension "Customer/Order/Coupon Export" (WooCommerce > Export > Orders), format "CSV Default - One Row per
-- Item". An item of several exports is taken from the last one.
--
-- Discounts  `item_total` is after coupons. Items of 0.00 have no row.
-- Shipping   Not included, and neither are fees.
-- Taxes      Not included, as in WooCommerce's net sales.
-- Refunds    A refunded order stays completed; a refund is a row of its own with a negative amount. Refunds of items are
--            `1001/7/refund`. Refunds that name no item are `1001/refund`: a refunded order returns what is left of its
--            goods. Another order without refunded items returns `refunded_total` less its share of tax, at most the
--            goods. Where items are refunded, the rest of `refunded_total` is taken for tax and shipping. The export has
--            the time of a refund only in older and custom formats: the time is that of the order.
-- Status     completed, processing, refunded: completed. pending, on-hold, checkout-draft: pending. cancelled, failed,
--            trash: cancelled. With or without `wc-`.
-- Customer   The hash of the billing e-mail address, for guests and accounts alike: an account is then the same customer
--            as in its earlier guest orders. Without an address, the hash of the account. Neither: a guest.
--
-- source orders: orders*, woocommerce_orders*, woocommerce-orders*
-- columns orders: order_id, date, order_date, status, order_currency, refunded_total, payment_method, customer_id
-- columns orders: billing_first_name, billing_last_name, billing_email, billing_city, shipping_city
-- columns orders: item_id, item_product_id, item_name, item_sku, item_quantity, item_total, item_total_tax, item_tax
-- columns orders: item_refunded, item_refunded_qty

WITH products AS (
    SELECT *,
        coalesce(
            nullif(nullif(trim(item_sku), ''), 'unknown_product'),
            nullif(nullif(trim(item_product_id), ''), '0'),
            nullif(trim(item_name), '')
        ) AS product_id
    FROM orders
),
-- Older versions of the extension export no item ids.
items AS (
    SELECT *,
        coalesce(nullif(trim(item_id), ''), concat(product_id, '-', ROW_NUMBER() OVER (
            PARTITION BY order_id, product_id, _delivery ORDER BY _source_row
        ))) AS item
    FROM products
),
latest AS (
    SELECT
        nullif(trim(order_id), '') AS order_id,
        item, product_id,
        regexp_replace(lower(trim(status)), '^wc-', '') AS order_status,
        CASE
            WHEN trim(billing_email) <> '' THEN xxhash64(lower(trim(billing_email)))
            WHEN trim(customer_id) NOT IN ('', '0') THEN xxhash64(trim(customer_id))
        END AS customer_id,
        item_quantity AS quantity,
        item_total AS amount,
        item_refunded AS refunded,
        try_cast(item_quantity AS INT) AS pieces,
        try_cast(item_total AS DECIMAL(12, 2)) AS goods,
        coalesce(try_cast(coalesce(item_total_tax, item_tax) AS DECIMAL(12, 2)), 0) AS tax,
        coalesce(try_cast(item_refunded AS DECIMAL(12, 2)), 0) AS goods_refunded,
        abs(coalesce(try_cast(item_refunded_qty AS INT), 0)) AS pieces_refunded,
        coalesce(try_cast(refunded_total AS DECIMAL(12, 2)), 0) AS order_refunded,
        CASE WHEN refunded_total <> '' AND try_cast(refunded_total AS DECIMAL(12, 2)) IS NULL THEN refunded_total END
            AS malformed_total,
        nullif(trim(order_currency), '') AS currency,
        coalesce(`date`, order_date) AS ordered_at,
        nullif(trim(payment_method), '') AS payment_method,
        coalesce(nullif(trim(shipping_city), ''), nullif(trim(billing_city), '')) AS location,
        _delivery, _source_file, _source_row
    FROM (
        SELECT *,
            ROW_NUMBER() OVER (PARTITION BY order_id, item ORDER BY _delivery DESC, _source_row DESC) AS recency
        FROM items
    )
    WHERE recency = 1
),
statuses AS (
    SELECT *,
        CASE
            WHEN order_status IN ('completed', 'processing', 'refunded') THEN 'completed'
            WHEN order_status IN ('pending', 'on-hold', 'checkout-draft') THEN 'pending'
            WHEN order_status IN ('cancelled', 'failed', 'trash') THEN 'cancelled'
            ELSE order_status
        END AS status
    FROM latest
),
order_refunds AS (
    SELECT
        order_id,
        MAX(customer_id) AS customer_id,
        MAX(currency) AS currency,
        MAX(ordered_at) AS ordered_at,
        MAX(payment_method) AS payment_method,
        MAX(location) AS location,
        SUM(pieces - pieces_refunded) AS pieces,
        MAX(order_status) = 'refunded' AS is_refunded,
        CAST(CASE
            WHEN MAX(order_status) = 'refunded' THEN SUM(goods - goods_refunded)
            WHEN SUM(goods_refunded) = 0 AND SUM(goods) > 0 THEN least(SUM(goods), round(
                CAST(MAX(order_refunded) * SUM(goods) AS DECIMAL(28, 4)) / (SUM(goods) + SUM(tax)), 2
            ))
        END AS DECIMAL(12, 2)) AS amount,
        MAX(malformed_total) AS malformed_total,
        MAX(_delivery) AS _delivery
    FROM statuses
    WHERE status = 'completed'
    GROUP BY order_id
)
SELECT
    concat(order_id, '/', item) AS transaction_id,
    order_id, customer_id, product_id, quantity, amount, currency, ordered_at AS timestamp, payment_method, status,
    location, _delivery, _source_file, _source_row
FROM statuses
WHERE coalesce(goods, 1) <> 0
UNION ALL
SELECT
    concat(order_id, '/', item, '/refund') AS transaction_id,
    order_id, customer_id, product_id,
    CAST(0 - greatest(pieces_refunded, 1) AS STRING) AS quantity,
    -- A text that is no number is handed on, so that the row is rejected with it.
    CASE WHEN try_cast(refunded AS DECIMAL(12, 2)) IS NULL THEN refunded ELSE CAST(0 - goods_refunded AS STRING) END
        AS amount,
    currency, ordered_at AS timestamp, payment_method, 'returned' AS status, location,
    _delivery, _source_file, _source_row
FROM statuses
WHERE status = 'completed' AND refunded <> '' AND coalesce(try_cast(refunded AS DECIMAL(12, 2)), 1) <> 0
UNION ALL
SELECT
    concat(order_id, '/refund') AS transaction_id,
    order_id, customer_id, CAST(NULL AS STRING) AS product_id,
    CAST(CASE WHEN is_refunded THEN 0 - greatest(pieces, 1) ELSE -1 END AS STRING) AS quantity,
    coalesce(malformed_total, CAST(0 - amount AS STRING)) AS amount,
    currency, ordered_at AS timestamp, payment_method, 'returned' AS status, location,
    _delivery, CAST(NULL AS STRING) AS _source_file, CAST(NULL AS BIGINT) AS _source_row
FROM order_refunds
WHERE amount > 0 OR malformed_total IS NOT NULL
